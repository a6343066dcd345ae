// The kernel's IOVA allocator (drivers/iommu/iova.c) as a peer: what the DMA API does with it, in pages of 4 KiB.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct iova_domain;

/// NULL without memory.
struct iova_domain* linux_iova_create(uint64_t first_page);
void linux_iova_destroy(struct iova_domain* domain);
/// Says which CPU the calling thread is on; threads that run at the same time are on different ones below 16.
void linux_iova_enter(unsigned cpu);
/// The first page of `pages`, 0 when there is none at or below `page_max`.
uint64_t linux_iova_allocate(struct iova_domain* domain, uint64_t pages, uint64_t page_max);
void linux_iova_free(struct iova_domain* domain, uint64_t first, uint64_t pages);
int linux_iova_reserve(struct iova_domain* domain, uint64_t first, uint64_t last);
/// The first page of the range that holds `page`, 0 for none.
uint64_t linux_iova_find(struct iova_domain* domain, uint64_t page);

#ifdef __cplusplus
}
#endif
