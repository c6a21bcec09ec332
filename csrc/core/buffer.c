#include "core/buffer.h"

#include <stdlib.h>
#include <string.h>

#include "core/wire.h"

enum { FIRST_CAP = 1024 };

static void forget(const mr_buffer *b, uint8_t *from, size_t n) {
  if (b->secret && b->data && n) mr_wipe(from, n);
}

void mr_buffer_compact(mr_buffer *b) {
  size_t size = mr_buffer_size(b);
  if (b->head == 0) return;
  if (b->data && size) memmove(b->data, b->data + b->head, size);
  forget(b, b->data + size, b->tail - size);
  b->tail = size;
  b->head = 0;
}

/* realloc could leave the old bytes somewhere in the heap. */
static uint8_t *move_secret(mr_buffer *b, size_t cap) {
  uint8_t *data = malloc(cap);
  if (!data) return NULL;
  memcpy(data, b->data, b->tail);
  forget(b, b->data, b->tail);
  free(b->data);
  return data;
}

static bool grow(mr_buffer *b, size_t need) {
  size_t cap = b->cap ? b->cap : FIRST_CAP;
  while (cap < need) {
    if (cap > SIZE_MAX / 2) return false;
    cap *= 2;
  }
  uint8_t *data = b->secret && b->data ? move_secret(b, cap) : realloc(b->data, cap);
  if (!data) return false;
  b->data = data;
  b->cap = cap;
  return true;
}

uint8_t *mr_buffer_reserve(mr_buffer *b, size_t n) {
  if (b->cap - b->tail >= n && b->data) return b->data + b->tail;
  if (n > SIZE_MAX - b->tail) return NULL;
  /* Moving at most as much as was consumed keeps the cost of a byte constant. */
  if (b->head >= mr_buffer_size(b)) mr_buffer_compact(b);
  bool small = !b->data || b->cap - b->tail < n;
  if (small && !grow(b, b->tail + n)) return NULL;
  return b->data + b->tail;
}

void mr_buffer_consume(mr_buffer *b, size_t n) {
  forget(b, b->data + b->head, n);
  b->head += n;
  if (b->head != b->tail) return;
  b->head = b->tail = 0;
  b->secret = false;
}

void mr_buffer_free(mr_buffer *b) {
  if (b->data) forget(b, b->data, b->tail);
  free(b->data);
  *b = (mr_buffer){0};
}
