#include "peers/linux_iova/domain.h"

#include <linux/iova.h>

__thread unsigned shim_cpu;

struct iova_domain* linux_iova_create(uint64_t first_page) {
  struct iova_domain* domain = calloc(1, sizeof *domain);
  if (domain == NULL) return NULL;
  if (iova_cache_get() != 0) {
    free(domain);
    return NULL;
  }
  init_iova_domain(domain, PAGE_SIZE, first_page);
  if (iova_domain_init_rcaches(domain) != 0) {
    linux_iova_destroy(domain);
    return NULL;
  }
  return domain;
}

void linux_iova_destroy(struct iova_domain* domain) {
  put_iova_domain(domain);
  iova_cache_put();
  free(domain);
}

void linux_iova_enter(unsigned cpu) { shim_cpu = cpu % SHIM_CPUS; }

uint64_t linux_iova_allocate(struct iova_domain* domain, uint64_t pages, uint64_t page_max) {
  return alloc_iova_fast(domain, pages, page_max, true);
}

void linux_iova_free(struct iova_domain* domain, uint64_t first, uint64_t pages) {
  free_iova_fast(domain, first, pages);
}

int linux_iova_reserve(struct iova_domain* domain, uint64_t first, uint64_t last) {
  return reserve_iova(domain, first, last) != NULL ? 0 : -1;
}

uint64_t linux_iova_find(struct iova_domain* domain, uint64_t page) {
  const struct iova* found = find_iova(domain, page);
  return found != NULL ? found->pfn_lo : 0;
}
