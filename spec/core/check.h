/*
 * A test harness in one header: each file *_test.c here is a program.
 *
 *   static void a_thing_works(void) { CHECK(1 + 1 == 2); CHECK_EQ(f(), 3); }
 *   int main(int argc, char **argv) {
 *     check_start(argc, argv);
 *     RUN(a_thing_works);
 *     return check_end();
 *   }
 *
 * Prints `ok - a thing works`, or `not ok - a thing works: file:line: why`, and at the end
 * `N passed, M failed`. A failed check ends its test and no other. With an argument only tests
 * whose name contains it run. CHECK_SEED in the environment makes random tests start elsewhere.
 */
#ifndef MOONRABBIT_CHECK_H
#define MOONRABBIT_CHECK_H

#include <inttypes.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  jmp_buf escape;
  bool running; /* a test: else a failure ends the program */
  const char *only;
  const char *skip_reason;
  int passed, failed, skipped;
  uint64_t random;
  char why[1024];
} check_state;

/* One program is one translation unit, so this is the only instance. */
static check_state check_the;

static inline void check_start(int argc, char **argv) {
  const char *seed = getenv("CHECK_SEED");
  setvbuf(stdout, NULL, _IOLBF, 0);
  check_the.only = argc > 1 ? argv[1] : NULL;
  check_the.random = seed ? strtoull(seed, NULL, 0) : 0x9e3779b97f4a7c15u;
}

__attribute__((noreturn, format(printf, 3, 4))) static inline void
check_fail(const char *file, int line, const char *format, ...) {
  va_list args;
  int n = snprintf(check_the.why, sizeof check_the.why, "%s:%d: ", file, line);
  va_start(args, format);
  vsnprintf(check_the.why + n, sizeof check_the.why - (size_t)n, format, args);
  va_end(args);
  if (!check_the.running) {
    fprintf(stderr, "%s\n", check_the.why);
    abort();
  }
  longjmp(check_the.escape, 1);
}

/* Ends the test: it cannot run here, for this reason. */
__attribute__((noreturn)) static inline void check_skip(const char *reason) {
  check_the.skip_reason = reason;
  longjmp(check_the.escape, 2);
}

/* xorshift64*: the same sequence everywhere. */
static inline uint64_t check_random(void) {
  uint64_t x = check_the.random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  check_the.random = x;
  return x * 0x2545f4914f6cdd1du;
}

/* 0 <= result < bound */
static inline uint32_t check_below(uint32_t bound) {
  return (uint32_t)((check_random() >> 32) % bound);
}

static inline void check_run(const char *identifier, void (*test)(void)) {
  char name[160];
  size_t i;
  for (i = 0; identifier[i] && i + 1 < sizeof name; i++)
    name[i] = identifier[i] == '_' ? ' ' : identifier[i];
  name[i] = 0;
  if (check_the.only && !strstr(name, check_the.only) && !strstr(identifier, check_the.only))
    return;
  check_the.running = true;
  switch (setjmp(check_the.escape)) {
    case 0:
      test();
      check_the.passed++;
      printf("ok - %s\n", name);
      break;
    case 2:
      check_the.skipped++;
      printf("ok - %s # skipped: %s\n", name, check_the.skip_reason);
      break;
    default: check_the.failed++; printf("not ok - %s: %s\n", name, check_the.why);
  }
  check_the.running = false;
}

static inline int check_end(void) {
  if (check_the.skipped)
    printf("%d passed, %d failed, %d skipped\n", check_the.passed, check_the.failed,
           check_the.skipped);
  else
    printf("%d passed, %d failed\n", check_the.passed, check_the.failed);
  return check_the.failed != 0;
}

#define RUN(test) check_run(#test, test)
#define FAIL(...) check_fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(condition) ((condition) ? (void)0 : check_fail(__FILE__, __LINE__, "%s", #condition))
#define CHECK_EQ(got, want) check_eq((int64_t)(got), (int64_t)(want), #got, __FILE__, __LINE__)
#define CHECK_BYTES(got, got_len, want, want_len) \
  check_bytes((got), (got_len), (want), (want_len), #got, __FILE__, __LINE__)

static inline void check_eq(int64_t got, int64_t want, const char *what, const char *file,
                            int line) {
  if (got != want) check_fail(file, line, "%s is %" PRId64 ", not %" PRId64, what, got, want);
}

static inline void check_bytes(const void *got, size_t got_len, const void *want, size_t want_len,
                               const char *what, const char *file, int line) {
  const uint8_t *g = got, *w = want;
  size_t at = 0;
  if (got_len == want_len && (got_len == 0 || memcmp(got, want, got_len) == 0)) return;
  while (at < got_len && at < want_len && g[at] == w[at]) at++;
  check_fail(file, line, "%s differs at byte %zu of %zu (wanted %zu bytes): %d, not %d", what, at,
             got_len, want_len, at < got_len ? g[at] : -1, at < want_len ? w[at] : -1);
}

#endif
