/* SPDX-License-Identifier: BSD-3-Clause
 *
 * Scratch of a call, and memory for weights.
 */
#define _DEFAULT_SOURCE /* madvise */

#include "qn_scratch.h"

#include <stdlib.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>

/* Of whole pages, so that what one thread writes never lies in a line of another's. */
enum { GRANULE = 4096, HUGE_PAGE = 2 << 20 };

static uint8_t *allocate(int64_t bytes, int64_t alignment) {
    void *memory;
    return posix_memalign(&memory, (size_t)alignment, (size_t)bytes) == 0 ? memory : NULL;
}

typedef struct {
    uint8_t *memory;
    int64_t bytes;
    int in_use; /* by a call that a signal handler, or a hook of the allocator, has interrupted */
} arena;

static _Thread_local arena own;
static pthread_key_t at_thread_end;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int have_key;

static void free_arena(void *memory) {
    free(memory);
    own = (arena){0};
}

static void make_key(void) { have_key = pthread_key_create(&at_thread_end, free_arena) == 0; }

uint8_t *qn_scratch_take(int64_t bytes) {
    if (bytes > QN_SCRATCH_KEPT || own.in_use) return allocate(bytes, GRANULE);
    if (own.bytes < bytes) {
        pthread_once(&once, make_key);
        if (!have_key) return allocate(bytes, GRANULE);
        bytes = (bytes + GRANULE - 1) / GRANULE * GRANULE;
        uint8_t *memory = allocate(bytes, GRANULE);
        if (!memory) return NULL;
        if (pthread_setspecific(at_thread_end, memory) != 0) {
            free(memory);
            return allocate(bytes, GRANULE);
        }
        free(own.memory);
        own.memory = memory;
        own.bytes = bytes;
    }
    own.in_use = 1;
    return own.memory;
}

void qn_scratch_give(uint8_t *memory) {
    if (memory && memory == own.memory)
        own.in_use = 0;
    else
        free(memory);
}

int64_t qn_scratch_kept(void) { return own.bytes; }

uint8_t *qn_weights_allocate(int64_t bytes) {
    int huge = bytes >= 2 * (int64_t)HUGE_PAGE;
    uint8_t *memory = allocate(bytes > 0 ? bytes : 1, huge ? HUGE_PAGE : GRANULE);
#ifdef MADV_HUGEPAGE
    if (memory && huge) madvise(memory, (size_t)(bytes / HUGE_PAGE * HUGE_PAGE), MADV_HUGEPAGE); /* a wish, not a need */
#endif
    return memory;
}

void qn_weights_free(uint8_t *memory) { free(memory); }

#else /* nothing is kept; what malloc gave lies in front of what is handed out */

static uint8_t *allocate(int64_t bytes) {
    uint8_t *memory = malloc((size_t)bytes + 64 + sizeof(void *));
    if (!memory) return NULL;
    uint8_t *aligned = (uint8_t *)(((uintptr_t)memory + sizeof(void *) + 63) & ~(uintptr_t)63);
    ((void **)aligned)[-1] = memory;
    return aligned;
}

static void release(uint8_t *memory) {
    if (memory) free(((void **)memory)[-1]);
}

uint8_t *qn_scratch_take(int64_t bytes) { return allocate(bytes); }
void qn_scratch_give(uint8_t *memory) { release(memory); }
int64_t qn_scratch_kept(void) { return 0; }
uint8_t *qn_weights_allocate(int64_t bytes) { return allocate(bytes); }
void qn_weights_free(uint8_t *memory) { release(memory); }

#endif
