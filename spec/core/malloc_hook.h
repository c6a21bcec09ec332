/*
 * Replaces malloc for the whole test program, librabbitmq included: counts allocations, counts what
 * is live, keeps the size of the largest, and can refuse the n-th. Include it once, in the program's only source file. Works with
 * glibc, also under AddressSanitizer; hook_works() says whether it does (not under valgrind).
 */
#ifndef MOONRABBIT_MALLOC_HOOK_H
#define MOONRABBIT_MALLOC_HOOK_H

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define HOOK_REAL(name) __interceptor_##name
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HOOK_REAL(name) __interceptor_##name
#endif
#endif
#ifndef HOOK_REAL
#define HOOK_REAL(name) __libc_##name
#endif

/* These run before a sanitizer's own start. */
#if defined(__clang__)
#define HOOK __attribute__((no_sanitize("address", "undefined")))
#else
#define HOOK __attribute__((no_sanitize_address, no_sanitize_undefined))
#endif
#define HOOK_PUBLIC HOOK __attribute__((visibility("default")))

extern void *HOOK_REAL(malloc)(size_t);
extern void *HOOK_REAL(calloc)(size_t, size_t);
extern void *HOOK_REAL(realloc)(void *, size_t);
extern void HOOK_REAL(free)(void *);

/* volatile: the compiler knows malloc, and believes that it changes nothing of ours */
static volatile struct {
  bool on;        /* counting */
  long calls;     /* allocations asked for while on */
  long fail_at;   /* this one is refused, 0: none */
  bool fail_rest; /* and every later one */
  long failed;
  long failed_below; /* of them, those that librabbitmq asked for */
  long live;         /* blocks allocated less blocks freed, while on */
  size_t largest;    /* block asked for while on */
} hook;

HOOK static bool hook_is_below(const void *caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "librabbitmq");
}

HOOK static bool hook_refuses(const void *caller, size_t size) {
  if (!hook.on) return false;
  hook.calls++;
  if (size > hook.largest) hook.largest = size;
  if (hook.fail_at == 0 || hook.calls < hook.fail_at ||
      (hook.calls > hook.fail_at && !hook.fail_rest))
    return false;
  hook.failed++;
  if (hook_is_below(caller)) hook.failed_below++;
  errno = ENOMEM;
  return true;
}

HOOK static void *hook_counted(void *block) {
  if (hook.on && block) hook.live++;
  return block;
}

HOOK_PUBLIC void *malloc(size_t n) {
  return hook_refuses(__builtin_return_address(0), n) ? NULL : hook_counted(HOOK_REAL(malloc)(n));
}

HOOK_PUBLIC void *calloc(size_t n, size_t size) {
  return hook_refuses(__builtin_return_address(0), n * size)
             ? NULL
             : hook_counted(HOOK_REAL(calloc)(n, size));
}

HOOK_PUBLIC void *realloc(void *old, size_t n) {
  void *block;
  if (hook_refuses(__builtin_return_address(0), n)) return NULL;
  block = HOOK_REAL(realloc)(old, n);
  return old ? block : hook_counted(block);
}

HOOK_PUBLIC void free(void *block) {
  if (hook.on && block) hook.live--;
  HOOK_REAL(free)(block);
}

static inline bool hook_works(void) {
  void *volatile block;
  long before = hook.calls;
  bool works;
  hook.on = true;
  block = malloc(1);
  works = hook.calls == before + 1;
  free(block);
  hook.on = false;
  hook.calls = before;
  return works;
}

#endif
