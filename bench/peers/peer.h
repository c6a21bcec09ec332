/* What the peers written in C share: arguments, clocks and the report. */
#ifndef BENCH_PEER_H
#define BENCH_PEER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

typedef struct {
  const char *mode;
  char *url;
  size_t size;
  uint64_t count;
  uint32_t window;
  char queue[256];
} peer_args;

static double peer_started, peer_cpu_started;

static inline void peer_die(const char *what) {
  fprintf(stderr, "peer: %s\n", what);
  exit(1);
}

static inline double peer_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline double peer_cpu(void) {
  struct rusage u;
  getrusage(RUSAGE_SELF, &u);
  return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
         (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

/* <mode> <url> <size> <count> <window or prefetch> */
static inline peer_args peer_parse(int argc, char **argv) {
  if (argc != 6) {
    fprintf(stderr, "usage: %s MODE URL SIZE COUNT WINDOW\n", argv[0]);
    exit(2);
  }
  peer_args a = {argv[1],
                 argv[2],
                 strtoull(argv[3], NULL, 10),
                 strtoull(argv[4], NULL, 10),
                 (uint32_t)strtoul(argv[5], NULL, 10),
                 ""};
  const char *queue = getenv("BENCH_QUEUE");
  if (queue != NULL && queue[0] != 0) {
    snprintf(a.queue, sizeof a.queue, "%s", queue);
  } else {
    snprintf(a.queue, sizeof a.queue, "bench-%zu", a.size);
  }
  return a;
}

static inline void peer_start(void) {
  peer_started = peer_now();
  peer_cpu_started = peer_cpu();
}

static inline long peer_rss_kb(void) {
  FILE *f = fopen("/proc/self/status", "r");
  char line[256];
  long kb = 0;
  while (f != NULL && fgets(line, sizeof line, f) != NULL) {
    if (sscanf(line, "VmHWM: %ld", &kb) == 1) {
      break;
    }
  }
  if (f != NULL) {
    fclose(f);
  }
  return kb;
}

static inline int peer_order(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* trips: seconds of each round trip, or NULL. */
static inline void peer_report(uint64_t messages, double *trips) {
  double seconds = peer_now() - peer_started;
  double cpu = peer_cpu() - peer_cpu_started;
  printf("{\"messages\":%llu,\"seconds\":%.6f,\"cpu_us\":%.4f,\"rss_kb\":%ld",
         (unsigned long long)messages, seconds, cpu / (double)messages * 1e6, peer_rss_kb());
  if (trips != NULL) {
    qsort(trips, messages, sizeof *trips, peer_order);
    printf(",\"median_us\":%.1f", trips[messages / 2] * 1e6);
  }
  printf("}\n");
  fflush(stdout);
}

#endif
