/* A growing byte queue: bytes go in at the tail and leave at the head. */
#ifndef MR_BUFFER_H
#define MR_BUFFER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
  uint8_t *data; /* owned; NULL while cap is 0 */
  size_t cap;
  size_t head;
  size_t tail;
  bool secret; /* holds credentials: no copy of them stays behind; false again once it is empty */
} mr_buffer;

static inline size_t mr_buffer_size(const mr_buffer *b) { return b->tail - b->head; }

/* Makes room for `n` more bytes at the tail; NULL: out of memory, and nothing changed. What the
 * caller held as a pointer into the buffer is invalid afterwards. */
uint8_t *mr_buffer_reserve(mr_buffer *b, size_t n);
/* Moves what is held to the front, so that all free space is at the tail. */
void mr_buffer_compact(mr_buffer *b);
/* Drops `n` bytes from the head. */
void mr_buffer_consume(mr_buffer *b, size_t n);
/* Gives the memory back; the buffer is empty and usable. */
void mr_buffer_free(mr_buffer *b);

#endif
