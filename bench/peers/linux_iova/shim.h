// What drivers/iommu/iova.c and lib/rbtree.c use of the kernel, in userspace. Included first when they are compiled.
//
// Kept: the locks (one atomic operation to take, one store to release), per-CPU data on lines of their own, one CPU per
// thread. Left out, all to the kernel's advantage: disabling of interrupts, and the timer that shrinks the depot.
// kmem_cache is the process's malloc.
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
typedef uint64_t dma_addr_t;
typedef unsigned gfp_t;
struct hlist_node {
  struct hlist_node *next, **pprev;
};

#define CONFIG_IOMMU_IOVA 1
#define IS_REACHABLE(option) option
#define GFP_KERNEL 0U
#define GFP_ATOMIC 0U
#define __GFP_NOWARN 0U
#define SLAB_HWCACHE_ALIGN 0
#define PAGE_SIZE 4096UL
#define ULLONG_MAX (~0ULL)
#define __percpu
#define __always_inline inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define READ_ONCE(x) (*(const volatile __typeof__(x)*)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x)*)&(x) = (value))
#define rcu_assign_pointer(p, v) __atomic_store_n(&(p), (v), __ATOMIC_RELEASE)
#define rcu_dereference_raw(p) READ_ONCE(p)
#define container_of(pointer, type, member) ((type*)((char*)(pointer)-offsetof(type, member)))
#define min(a, b) ((a) < (b) ? (a) : (b))
#define swap(a, b)         \
  do {                     \
    __typeof__(a) t = (a); \
    (a) = (b);             \
    (b) = t;               \
  } while (0)
#define static_assert _Static_assert
#define BUG_ON(x) ((x) ? abort() : (void)0)
#define WARN_ON(x) (!!(x))
#define pr_err(...) ((void)0)
#define ERR_PTR(x) ((void*)(intptr_t)(x))
#define EXPORT_SYMBOL(x)
#define EXPORT_SYMBOL_GPL(x)
#define MODULE_AUTHOR(x)
#define MODULE_DESCRIPTION(x)
#define MODULE_LICENSE(x)
#define kmemleak_transient_leak(x) ((void)0)

static inline unsigned fls_long(unsigned long x) { return x == 0 ? 0U : 64U - (unsigned)__builtin_clzl(x); }
static inline unsigned __ffs(unsigned long x) { return (unsigned)__builtin_ctzl(x); }
static inline bool is_power_of_2(unsigned long x) { return x != 0 && (x & (x - 1)) == 0; }
static inline unsigned order_base_2(unsigned long x) { return x <= 1 ? 0U : fls_long(x - 1); }
static inline unsigned long roundup_pow_of_two(unsigned long x) { return 1UL << order_base_2(x); }

typedef struct {
  int held;
} spinlock_t;
static inline void spin_lock_init(spinlock_t* lock) { lock->held = 0; }
static inline void spin_lock(spinlock_t* lock) {
  for (;;) {
    int free = 0;
    if (likely(__atomic_compare_exchange_n(&lock->held, &free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))) return;
    while (__atomic_load_n(&lock->held, __ATOMIC_RELAXED) != 0) __builtin_ia32_pause();
  }
}
static inline void spin_unlock(spinlock_t* lock) { __atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE); }
#define spin_lock_irqsave(lock, flags) ((flags) = 0, spin_lock(lock))
#define spin_unlock_irqrestore(lock, flags) ((void)(flags), spin_unlock(lock))
#define assert_spin_locked(lock) ((void)(lock))
#define DEFINE_MUTEX(name) spinlock_t name
#define mutex_lock(lock) spin_lock(lock)
#define mutex_unlock(lock) spin_unlock(lock)

// One CPU per thread; linux_iova_enter() says which.
#define SHIM_CPUS 16U
#define SHIM_CPU_STRIDE 128U
extern __thread unsigned shim_cpu;
#define per_cpu_ptr(p, cpu) ((__typeof__(p))((char*)(p) + (size_t)(cpu)*SHIM_CPU_STRIDE))
#define raw_cpu_ptr(p) per_cpu_ptr(p, shim_cpu)
#define __alloc_percpu(size, align) \
  ((void)(align), (size) > SHIM_CPU_STRIDE ? NULL : aligned_alloc(SHIM_CPU_STRIDE, SHIM_CPUS * SHIM_CPU_STRIDE))
#define free_percpu(p) free(p)
#define for_each_possible_cpu(cpu) for ((cpu) = 0; (cpu) < SHIM_CPUS; ++(cpu))
#define for_each_online_cpu(cpu) for_each_possible_cpu(cpu)
#define num_online_cpus() SHIM_CPUS
#define cache_line_size() 64U

struct kmem_cache {
  size_t size;
};
static inline struct kmem_cache* kmem_cache_create(const char* name, size_t size, size_t align, int flags, void* made) {
  (void)name, (void)align, (void)flags, (void)made;
  struct kmem_cache* cache = malloc(sizeof *cache);
  if (cache != NULL) cache->size = size;
  return cache;
}
static inline void kmem_cache_destroy(struct kmem_cache* cache) { free(cache); }
static inline void* kmem_cache_alloc(struct kmem_cache* cache, gfp_t flags) {
  (void)flags;
  return malloc(cache->size);
}
static inline void* kmem_cache_zalloc(struct kmem_cache* cache, gfp_t flags) {
  void* object = kmem_cache_alloc(cache, flags);
  if (object != NULL) memset(object, 0, cache->size);
  return object;
}
static inline void kmem_cache_free(struct kmem_cache* cache, void* object) {
  (void)cache;
  free(object);
}
#define kcalloc(count, size, flags) ((void)(flags), calloc(count, size))
#define kfree(p) free(p)

// Nobody unplugs a CPU here, and nothing runs later.
struct work_struct {
  int unused;
};
struct delayed_work {
  struct work_struct work;
};
#define INIT_DELAYED_WORK(delayed, function) ((void)(delayed), (void)(function))
#define schedule_delayed_work(delayed, delay) ((void)(delayed))
#define cancel_delayed_work_sync(delayed) ((void)(delayed))
#define msecs_to_jiffies(x) (x)
#define CPUHP_IOMMU_IOVA_DEAD 0
#define cpuhp_state_add_instance_nocalls(state, node) ((void)(node), 0)
#define cpuhp_state_remove_instance_nocalls(state, node) ((void)(node))
#define cpuhp_setup_state_multi(state, name, up, down) ((void)(down), 0)
#define cpuhp_remove_multi_state(state) ((void)0)
#define hlist_entry_safe(pointer, type, member) \
  ({                                            \
    __typeof__(pointer) p = (pointer);          \
    p ? container_of(p, type, member) : NULL;   \
  })
