#include "core/wire.h"

mr_reader mr_reader_of(amqp_bytes_t bytes, bool ok) {
  static const uint8_t NOTHING[1];
  const uint8_t *p = bytes.bytes ? bytes.bytes : NOTHING;
  mr_reader r = {p, p + bytes.len, ok};
  return r;
}

static const uint8_t *take(mr_reader *r, size_t n) {
  if (!r->ok || (size_t)(r->end - r->p) < n) {
    r->ok = false;
    return NULL;
  }
  const uint8_t *p = r->p;
  r->p += n;
  return p;
}

uint8_t mr_read8(mr_reader *r) {
  const uint8_t *p = take(r, 1);
  return p ? *p : 0;
}

uint16_t mr_read16(mr_reader *r) {
  const uint8_t *p = take(r, 2);
  return p ? mr_get16(p) : 0;
}

uint32_t mr_read32(mr_reader *r) {
  const uint8_t *p = take(r, 4);
  return p ? mr_get32(p) : 0;
}

uint64_t mr_read64(mr_reader *r) {
  const uint8_t *p = take(r, 8);
  return p ? mr_get64(p) : 0;
}

static amqp_bytes_t read_bytes(mr_reader *r, size_t n) {
  const uint8_t *p = take(r, n);
  return p ? mr_bytes(p, n) : mr_bytes(NULL, 0);
}

amqp_bytes_t mr_read_shortstr(mr_reader *r) { return read_bytes(r, mr_read8(r)); }

amqp_bytes_t mr_read_longstr(mr_reader *r) { return read_bytes(r, mr_read32(r)); }
