/* Bytes on the wire: big-endian numbers, strings and frames. */
#ifndef MR_WIRE_H
#define MR_WIRE_H

#include <string.h>

#include "core/moonrabbit.h"

enum {
  MR_FRAME_OVERHEAD = 8, /* type, channel, size, end */
  MR_FRAME_HEADER = 7,
  MR_FRAME_END = 0xCE,
  MR_CONTENT_HEADER = 12, /* class, weight, body size */
  MR_SHORTSTR_MAX = 255,
  MR_MIN_FRAME_MAX = 4096,
  MR_DEFAULT_FRAME_MAX = 131072
};

static inline uint16_t mr_get16(const uint8_t *p) { return (uint16_t)(p[0] << 8 | p[1]); }

static inline uint32_t mr_get32(const uint8_t *p) {
  return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static inline uint64_t mr_get64(const uint8_t *p) {
  return (uint64_t)mr_get32(p) << 32 | mr_get32(p + 4);
}

/* The writers return the place behind what they wrote. */
static inline uint8_t *mr_put8(uint8_t *p, uint8_t v) {
  *p = v;
  return p + 1;
}

static inline uint8_t *mr_put16(uint8_t *p, uint16_t v) {
  p[0] = (uint8_t)(v >> 8);
  p[1] = (uint8_t)v;
  return p + 2;
}

static inline uint8_t *mr_put32(uint8_t *p, uint32_t v) {
  p[0] = (uint8_t)(v >> 24);
  p[1] = (uint8_t)(v >> 16);
  p[2] = (uint8_t)(v >> 8);
  p[3] = (uint8_t)v;
  return p + 4;
}

static inline uint8_t *mr_put64(uint8_t *p, uint64_t v) {
  return mr_put32(mr_put32(p, (uint32_t)(v >> 32)), (uint32_t)v);
}

static inline uint8_t *mr_put_bytes(uint8_t *p, const void *bytes, size_t n) {
  if (n) memcpy(p, bytes, n);
  return p + n;
}

static inline uint8_t *mr_put_shortstr(uint8_t *p, amqp_bytes_t s) {
  return mr_put_bytes(mr_put8(p, (uint8_t)s.len), s.bytes, s.len);
}

static inline uint8_t *mr_put_longstr(uint8_t *p, amqp_bytes_t s) {
  return mr_put_bytes(mr_put32(p, (uint32_t)s.len), s.bytes, s.len);
}

static inline uint8_t *mr_put_frame_header(uint8_t *p, uint8_t type, uint16_t channel,
                                           uint32_t size) {
  return mr_put32(mr_put16(mr_put8(p, type), channel), size);
}

/* Overwrites secrets in a way that a compiler may not leave out. */
static inline void mr_wipe(void *bytes, size_t n) {
  volatile uint8_t *p = bytes;
  while (n--) *p++ = 0;
}

static inline bool mr_bytes_equal(amqp_bytes_t a, amqp_bytes_t b) {
  return a.len == b.len && (a.len == 0 || memcmp(a.bytes, b.bytes, a.len) == 0);
}

static inline amqp_bytes_t mr_bytes(const void *bytes, size_t len) {
  amqp_bytes_t b = {len, (void *)(uintptr_t)bytes};
  return b;
}

/* Takes values off untrusted bytes; once something is missing, `ok` stays false and every further
 * value is zero or empty. */
typedef struct {
  const uint8_t *p;
  const uint8_t *end;
  bool ok;
} mr_reader;

/* `ok` false: what the bytes were read from was cut off already. */
mr_reader mr_reader_of(amqp_bytes_t bytes, bool ok);
uint8_t mr_read8(mr_reader *r);
uint16_t mr_read16(mr_reader *r);
uint32_t mr_read32(mr_reader *r);
uint64_t mr_read64(mr_reader *r);
amqp_bytes_t mr_read_shortstr(mr_reader *r);
amqp_bytes_t mr_read_longstr(mr_reader *r);

#endif
