/* Randomness: bytes of the system's, and a quick generator for jitter and the like, which is seeded by them. */
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#if defined(__has_include)
#if __has_include(<sys/random.h>)
#include <sys/random.h>
#define MR_HAVE_GETENTROPY 1
#endif
#endif

#include "lua/binding.h"

enum { MOST_BYTES = 256 }; /* getentropy gives no more at once */

static bool from_system(void *bytes, size_t n) {
#ifdef MR_HAVE_GETENTROPY
  if (getentropy(bytes, n) == 0) return true;
#endif
  FILE *file = fopen("/dev/urandom", "rb");
  if (!file) return false;
  size_t got = fread(bytes, 1, n, file);
  (void)fclose(file);
  return got == n;
}

/* The finalizer of SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/* Where the system gives nothing: what differs between two processes, and two states of one. */
static void improvise(const mrl_random *r, int pid, uint64_t words[2]) {
  struct timespec now = {0};
  clock_gettime(CLOCK_REALTIME, &now);
  words[0] = mix((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) ^ mix((uint64_t)pid);
  words[1] = mix((uint64_t)(uintptr_t)r) ^ mix(r->state);
}

/* SplitMix64, with a step of its own for each seed. A process that was forked begins anew: workers of
 * nginx share what was loaded before they began. */
static uint64_t draw(mrl_random *r) {
  int pid = (int)getpid();
  if (r->pid != pid) {
    uint64_t words[2];
    if (!from_system(words, sizeof words)) improvise(r, pid, words);
    r->state = words[0];
    r->step = words[1] | 1;
    r->pid = pid;
  }
  r->state += r->step;
  return mix(r->state);
}

int mrl_random_number(lua_State *L) {
  lua_pushnumber(L, (lua_Number)(draw(&mrl_get_state(L)->random) >> 11) * 0x1p-53);
  return 1;
}

int mrl_random_bytes(lua_State *L) {
  uint8_t bytes[MOST_BYTES];
  lua_Integer n = luaL_checkinteger(L, 1);
  luaL_argcheck(L, n >= 1 && n <= MOST_BYTES, 1, "1 to 256 expected");
  if (!from_system(bytes, (size_t)n)) {
    for (lua_Integer i = 0; i < n; i++) bytes[i] = (uint8_t)(draw(&mrl_get_state(L)->random) >> 56);
  }
  lua_pushlstring(L, (const char *)bytes, (size_t)n);
  return 1;
}
