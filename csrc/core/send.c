/* Method frames, encoded and decoded with rabbitmq-c. */
#include "core/engine.h"

enum {
  METHOD_ROOM = 512, /* most methods fit; a larger one is encoded a second time */
  MOST_ANSWERS = 1 << 20
};

static long encode_method(mr_engine *e, uint16_t channel, amqp_method_number_t method,
                          void *decoded, size_t room) {
  uint8_t *p = mr_buffer_reserve(&e->tx, room + MR_FRAME_OVERHEAD + 4);
  if (!p) return MR_NO_MEMORY;
  int n = amqp_encode_method(method, decoded, mr_bytes(p + MR_FRAME_HEADER + 4, room));
  if (n < 0) return MR_TOO_LARGE;
  mr_put32(mr_put_frame_header(p, AMQP_FRAME_METHOD, channel, (uint32_t)n + 4), method);
  mr_put8(p + MR_FRAME_HEADER + 4 + n, MR_FRAME_END);
  return n;
}

mr_status mr_send_method(mr_engine *e, uint16_t channel, amqp_method_number_t method,
                         void *decoded) {
  long n = encode_method(e, channel, method, decoded, METHOD_ROOM);
  if (n == MR_TOO_LARGE)
    n = encode_method(e, channel, method, decoded, e->tuned.frame_max - MR_FRAME_OVERHEAD - 4);
  if (n < 0) return (mr_status)n;
  e->tx.tail += (size_t)n + 4 + MR_FRAME_OVERHEAD;
  return MR_OK;
}

bool mr_answer(mr_engine *e, uint16_t channel, amqp_method_number_t method, void *decoded) {
  size_t before = mr_buffer_size(&e->tx);
  if (mr_send_method(e, channel, method, decoded) != MR_OK) {
    mr_end(e, MR_KIND_MEMORY, 0, "out of memory for an answer");
    return false;
  }
  e->answers += mr_buffer_size(&e->tx) - before;
  if (e->answers <= MOST_ANSWERS) return true;
  mr_end(e, MR_KIND_PROTOCOL, 0, "the broker reads no answers to what it asks");
  return false;
}

void *mr_decode_method(mr_engine *e, amqp_pool_t *pool, amqp_method_number_t method,
                       amqp_bytes_t args) {
  void *decoded = NULL;
  int n = amqp_decode_method(method, pool, args, &decoded);
  if (n >= 0) return decoded;
  if (n == AMQP_STATUS_NO_MEMORY)
    mr_end(e, MR_KIND_MEMORY, 0, "out of memory for a method");
  else
    mr_protocol_error(e, AMQP_SYNTAX_ERROR, "method %u.%u cannot be decoded", method >> 16,
                      method & 0xFFFF);
  return NULL;
}
