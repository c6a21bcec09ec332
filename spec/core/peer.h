/*
 * The other end of an engine under test: builds the broker's frames, takes the client's output
 * apart frame by frame, and owns the clock. No sockets, no threads: `peer.now` moves when the test
 * moves it.
 *
 * Broker's frames are queued by peer_method, peer_header, peer_body ...; peer_next hands them to
 * the engine piece by piece (`peer.split` says how) and returns the next event.
 */
#ifndef MOONRABBIT_PEER_H
#define MOONRABBIT_PEER_H

#include "check.h"
#include "core/moonrabbit.h"

typedef struct {
  uint8_t *data;
  size_t len, capacity, pos;
} peer_buffer;

typedef enum { PEER_WHOLE, PEER_BYTES, PEER_RANDOM } peer_split;

/* One frame of the client's. What it points to is valid until the next peer_take. */
typedef struct {
  uint8_t type;
  uint16_t channel;
  amqp_bytes_t payload;
  amqp_method_number_t method; /* of a method frame */
  void *decoded;      /* NULL for connection.update-secret, which rabbitmq-c does not know */
  uint64_t body_size; /* of a header frame */
  amqp_bytes_t props;
} peer_frame;

typedef struct {
  mr_engine *engine;
  double now;
  peer_split split;
  uint32_t frame_max; /* for the bodies that peer_content sends */
  peer_buffer to_client, from_client;
  amqp_pool_t pool;
  mr_event event; /* of the last peer_next */
  bool closed;    /* MR_EV_CLOSED was seen */
  peer_frame frame;
} peer;

#define BYTES(text) ((amqp_bytes_t){.len = strlen(text), .bytes = (void *)(uintptr_t)(text)})
#define NO_TABLE ((amqp_table_t){.num_entries = 0, .entries = NULL})

/* `got` is an amqp_bytes_t, `want` a C string. */
#define CHECK_TEXT(got, want) peer_check_text((got), (want), #got, __FILE__, __LINE__)

static inline void peer_check_text(amqp_bytes_t got, const char *want, const char *what,
                                   const char *file, int line) {
  check_bytes(got.bytes, got.len, want, strlen(want), what, file, line);
}

/* peer_send(p, 1, BASIC_ACK, basic_ack, .delivery_tag = 7) */
#define peer_send(p, channel, NAME, name, ...) \
  peer_method(p, channel, AMQP_##NAME##_METHOD, &(amqp_##name##_t){__VA_ARGS__})
/* The same as a command of the client. */
#define call(channel, NAME, name, ...) \
  mr_call(channel, AMQP_##NAME##_METHOD, &(amqp_##name##_t){__VA_ARGS__})
/* The next frame of the client's must be this method; its decoded arguments. */
#define expect(p, channel, NAME, name) \
  ((amqp_##name##_t *)peer_expect(p, channel, AMQP_##NAME##_METHOD, __FILE__, __LINE__))
#define expect_nothing(p) peer_expect_nothing(p, __FILE__, __LINE__)
/* The next event must be of this type. */
#define expect_event(p, type) peer_expect_event(p, type, __FILE__, __LINE__)
#define expect_no_event(p) ((void)peer_expect_event(p, MR_EV_NONE, __FILE__, __LINE__))
/* The next event must be a reply of this method on this channel; its decoded arguments. */
#define expect_reply(p, channel, NAME) \
  peer_expect_reply(p, channel, AMQP_##NAME##_METHOD, __FILE__, __LINE__)

/* ---- bytes ---- */

static inline void peer_room(peer_buffer *b, size_t n) {
  if (b->capacity - b->len >= n) return;
  b->capacity = (b->len + n) * 2;
  b->data = realloc(b->data, b->capacity);
  if (!b->data) abort();
}

static inline void peer_bytes(peer_buffer *b, const void *bytes, size_t n) {
  peer_room(b, n);
  if (n) memcpy(b->data + b->len, bytes, n);
  b->len += n;
}

static inline void peer_be(uint8_t *at, uint64_t value, int width) {
  for (int i = 0; i < width; i++) at[i] = (uint8_t)(value >> (8 * (width - 1 - i)));
}

static inline uint64_t peer_from_be(const uint8_t *at, int width) {
  uint64_t value = 0;
  for (int i = 0; i < width; i++) value = value << 8 | at[i];
  return value;
}

/* ---- the broker's frames ---- */

static inline void peer_frame_of(peer *p, uint8_t type, uint16_t channel, const void *payload,
                                 size_t n) {
  uint8_t head[7] = {type};
  peer_be(head + 1, channel, 2);
  peer_be(head + 3, n, 4);
  peer_bytes(&p->to_client, head, 7);
  peer_bytes(&p->to_client, payload, n);
  peer_bytes(&p->to_client, "\xCE", 1);
}

/* Tries with little room first: fuzzers come here millions of times. */
static inline int peer_encode(peer_buffer *b, amqp_method_number_t method, void *decoded,
                              size_t room) {
  peer_room(b, room + 12);
  return amqp_encode_method(method, decoded,
                            (amqp_bytes_t){.len = room, .bytes = b->data + b->len + 11});
}

static inline void peer_method(peer *p, uint16_t channel, amqp_method_number_t method,
                               void *decoded) {
  peer_buffer *b = &p->to_client;
  uint8_t *head;
  int n = 0;
  peer_room(b, 12);
  if (decoded) n = peer_encode(b, method, decoded, 1000);
  if (n < 0) n = peer_encode(b, method, decoded, 131000);
  if (n < 0) FAIL("cannot encode method %08x: %s", (unsigned)method, amqp_error_string2(n));
  head = b->data + b->len;
  head[0] = AMQP_FRAME_METHOD;
  peer_be(head + 1, channel, 2);
  peer_be(head + 3, (uint64_t)n + 4, 4);
  peer_be(head + 7, method, 4);
  head[11 + n] = 0xCE;
  b->len += (size_t)n + 12;
}

static inline void peer_header_raw(peer *p, uint16_t channel, uint64_t body_size,
                                   amqp_bytes_t props) {
  uint8_t *payload = malloc(12 + props.len);
  if (!payload) abort();
  peer_be(payload, AMQP_BASIC_CLASS, 2);
  peer_be(payload + 2, 0, 2);
  peer_be(payload + 4, body_size, 8);
  memcpy(payload + 12, props.bytes, props.len);
  peer_frame_of(p, AMQP_FRAME_HEADER, channel, payload, 12 + props.len);
  free(payload);
}

/* `props` may be NULL. */
static inline void peer_header(peer *p, uint16_t channel, uint64_t body_size,
                               const amqp_basic_properties_t *props) {
  static const amqp_basic_properties_t NONE = {._flags = 0};
  uint8_t *bytes = NULL;
  size_t n = 0;
  if (mr_props_encode(props ? props : &NONE, &bytes, &n) != MR_OK) FAIL("cannot encode properties");
  peer_header_raw(p, channel, body_size, (amqp_bytes_t){.len = n, .bytes = bytes});
  free(bytes);
}

static inline void peer_body(peer *p, uint16_t channel, const void *body, size_t n) {
  peer_frame_of(p, AMQP_FRAME_BODY, channel, body, n);
}

/* Header and body frames. */
static inline void peer_content(peer *p, uint16_t channel, amqp_basic_properties_t *props,
                                const void *body, size_t n) {
  size_t most = p->frame_max - 8;
  peer_header(p, channel, n, props);
  for (size_t at = 0; at < n; at += most)
    peer_body(p, channel, (const uint8_t *)body + at, n - at < most ? n - at : most);
}

static inline void peer_deliver(peer *p, uint16_t channel, const char *consumer_tag, uint64_t tag,
                                const char *body) {
  peer_send(p, channel, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES(consumer_tag),
            .delivery_tag = tag, .exchange = BYTES("x"), .routing_key = BYTES("k"));
  peer_content(p, channel, NULL, body, strlen(body));
}

static inline void peer_ack(peer *p, uint16_t channel, uint64_t tag, bool multiple) {
  peer_send(p, channel, BASIC_ACK, basic_ack, .delivery_tag = tag, .multiple = multiple);
}

static inline void peer_nack(peer *p, uint16_t channel, uint64_t tag, bool multiple) {
  peer_send(p, channel, BASIC_NACK, basic_nack, .delivery_tag = tag, .multiple = multiple);
}

static inline void peer_heartbeat(peer *p) { peer_frame_of(p, AMQP_FRAME_HEARTBEAT, 0, NULL, 0); }

/* ---- events ---- */

/* Gives the engine the next piece of what waits for it; false when nothing does. */
static inline bool peer_feed(peer *p) {
  peer_buffer *b = &p->to_client;
  size_t left = b->len - b->pos, n = left, took;
  if (left == 0) return false;
  if (p->split == PEER_BYTES) n = 1;
  if (p->split == PEER_RANDOM) {
    n = 1 + check_below(check_below(8) ? 23 : 5000);
    if (n > left) n = left;
  }
  if (p->split == PEER_RANDOM && check_below(2)) {
    size_t space = 0;
    uint8_t *place = mr_engine_rx_reserve(p->engine, &space);
    took = place ? (n < space ? n : space) : 0;
    if (took) memcpy(place, b->data + b->pos, took);
    if (took) mr_engine_rx_commit(p->engine, took, p->now);
  } else {
    took = mr_engine_feed(p->engine, b->data + b->pos, n, p->now);
  }
  if (took == 0) FAIL("the engine takes no bytes though every event was taken");
  if (took > n) FAIL("the engine took %zu of %zu bytes", took, n);
  b->pos += took;
  if (b->pos == b->len) b->len = b->pos = 0;
  return true;
}

static inline mr_event_type peer_next(peer *p) {
  for (;;) {
    mr_event_type type = mr_engine_next(p->engine, &p->event);
    if (type != p->event.type)
      FAIL("mr_engine_next returned %d for an event of type %d", type, p->event.type);
    if (type == MR_EV_CLOSED) p->closed = true;
    if (type != MR_EV_NONE || p->closed || !peer_feed(p)) return type;
  }
}

static inline mr_event *peer_expect_event(peer *p, mr_event_type type, const char *file, int line) {
  mr_event_type got = peer_next(p);
  if (got != type && (got == MR_EV_CLOSED || got == MR_EV_CHANNEL_CLOSED))
    check_fail(file, line, "event %d (%d %s), not %d", got, p->event.error.kind,
               p->event.error.text, type);
  if (got != type) check_fail(file, line, "event %d, not %d", got, type);
  return &p->event;
}

static inline void *peer_expect_reply(peer *p, mr_channel *channel, amqp_method_number_t method,
                                      const char *file, int line) {
  mr_event *ev = peer_expect_event(p, MR_EV_REPLY, file, line);
  if (ev->method.id != method)
    check_fail(file, line, "reply %08x, not %08x", (unsigned)ev->method.id, (unsigned)method);
  if (ev->channel != channel)
    check_fail(file, line, "the reply %08x is of another channel", (unsigned)method);
  return ev->method.decoded;
}

/* ---- the client's output ---- */

/* Moves what the engine has to say to from_client. */
static inline void peer_pull(peer *p) {
  size_t n;
  const uint8_t *bytes;
  while ((bytes = mr_engine_tx_peek(p->engine, &n)) != NULL) {
    if (n == 0) FAIL("an empty tx_peek that is not NULL");
    if (p->split != PEER_WHOLE && n > 1) n = 1 + check_below((uint32_t)n);
    peer_bytes(&p->from_client, bytes, n);
    mr_engine_tx_consume(p->engine, n, p->now);
  }
  if (n != 0) FAIL("tx_peek returned NULL and a length");
}

/* The client's next frame; false when there is none. */
static inline bool peer_take(peer *p, peer_frame *frame) {
  peer_buffer *b = &p->from_client;
  uint8_t *at;
  size_t left, size;
  peer_pull(p);
  memset(frame, 0, sizeof *frame);
  left = b->len - b->pos;
  if (left == 0) {
    b->len = b->pos = 0;
    return false;
  }
  at = b->data + b->pos;
  if (left < 8) FAIL("%zu bytes are left over", left);
  frame->type = at[0];
  frame->channel = (uint16_t)peer_from_be(at + 1, 2);
  size = (size_t)peer_from_be(at + 3, 4);
  if (left < size + 8) FAIL("a frame of type %d is cut: %zu of %zu bytes", at[0], left, size + 8);
  if (at[size + 7] != 0xCE) FAIL("a frame of type %d and %zu bytes has no end", at[0], size);
  if (p->frame_max && size + 8 > p->frame_max)
    FAIL("a frame of %zu bytes is over frame_max %u", size + 8, p->frame_max);
  frame->payload.bytes = at + 7;
  frame->payload.len = size;
  b->pos += size + 8;
  recycle_amqp_pool(&p->pool);
  if (frame->type == AMQP_FRAME_METHOD) {
    amqp_bytes_t arguments = {.len = size - 4, .bytes = at + 11};
    int status = 0;
    if (size < 4) FAIL("a method frame of %zu bytes", size);
    frame->method = (amqp_method_number_t)peer_from_be(at + 7, 4);
    if (frame->method != MR_CONNECTION_UPDATE_SECRET)
      status = amqp_decode_method(frame->method, &p->pool, arguments, &frame->decoded);
    if (status < 0) FAIL("method %08x: %s", (unsigned)frame->method, amqp_error_string2(status));
  } else if (frame->type == AMQP_FRAME_HEADER) {
    if (size < 14) FAIL("a header frame of %zu bytes", size);
    CHECK_EQ(peer_from_be(at + 7, 2), AMQP_BASIC_CLASS);
    CHECK_EQ(peer_from_be(at + 9, 2), 0);
    frame->body_size = peer_from_be(at + 11, 8);
    frame->props.bytes = at + 19;
    frame->props.len = size - 12;
  } else if (frame->type == AMQP_FRAME_HEARTBEAT) {
    CHECK_EQ(frame->channel, 0);
    CHECK_EQ(size, 0);
  } else {
    CHECK_EQ(frame->type, AMQP_FRAME_BODY);
  }
  return true;
}

static inline void *peer_expect(peer *p, uint16_t channel, amqp_method_number_t method,
                                const char *file, int line) {
  if (!peer_take(p, &p->frame))
    check_fail(file, line, "the client sent nothing, not method %08x", (unsigned)method);
  if (p->frame.type != AMQP_FRAME_METHOD || p->frame.method != method ||
      p->frame.channel != channel)
    check_fail(
        file, line,
        "the client sent a frame of type %d, channel %d, method %08x, not %08x on channel %d",
        p->frame.type, p->frame.channel, (unsigned)p->frame.method, (unsigned)method, channel);
  return p->frame.decoded;
}

static inline peer_frame *peer_expect_type(peer *p, uint16_t channel, uint8_t type) {
  if (!peer_take(p, &p->frame)) FAIL("the client sent nothing, not a frame of type %d", type);
  if (p->frame.type != type || p->frame.channel != channel)
    FAIL("the client sent a frame of type %d on channel %d, not %d on %d", p->frame.type,
         p->frame.channel, type, channel);
  return &p->frame;
}

static inline void peer_expect_nothing(peer *p, const char *file, int line) {
  if (peer_take(p, &p->frame))
    check_fail(file, line, "the client sent a frame of type %d, channel %d, method %08x",
               p->frame.type, p->frame.channel, (unsigned)p->frame.method);
}

/* Forgets what the client has said so far. */
static inline void peer_discard(peer *p) {
  peer_pull(p);
  p->from_client.len = p->from_client.pos = 0;
}

/* basic.publish, its header and body; the body is returned and belongs to the caller. */
static inline uint8_t *peer_take_publish(peer *p, uint16_t channel, size_t *body_size,
                                         size_t *frames) {
  peer_frame *f;
  uint8_t *body;
  size_t at = 0;
  expect(p, channel, BASIC_PUBLISH, basic_publish);
  f = peer_expect_type(p, channel, AMQP_FRAME_HEADER);
  *body_size = (size_t)f->body_size;
  *frames = 0;
  body = malloc(*body_size + 1);
  if (!body) abort();
  while (at < *body_size) {
    f = peer_expect_type(p, channel, AMQP_FRAME_BODY);
    if (f->payload.len == 0 || f->payload.len > *body_size - at)
      FAIL("a body frame of %zu bytes", f->payload.len);
    memcpy(body + at, f->payload.bytes, f->payload.len);
    at += f->payload.len;
    ++*frames;
  }
  return body;
}

/* ---- a session ---- */

static inline mr_config peer_config(void) {
  return (mr_config){
      .vhost = BYTES("/"), .user = BYTES("guest"), .password = BYTES("secret"), .ack_delay = -1};
}

static inline peer *peer_new(const mr_config *config) {
  peer *p = calloc(1, sizeof *p);
  mr_error err = {.kind = 0};
  if (!p) abort();
  init_amqp_pool(&p->pool, 4096);
  p->now = 1000;
  p->engine = mr_engine_new(config, &err);
  if (!p->engine) FAIL("mr_engine_new: %s", err.text);
  return p;
}

static inline void peer_free(peer *p) {
  mr_engine_free(p->engine);
  empty_amqp_pool(&p->pool);
  free(p->to_client.data);
  free(p->from_client.data);
  free(p);
}

/* Takes the protocol header that mr_engine_start queued. */
static inline void peer_expect_protocol(peer *p) {
  peer_pull(p);
  CHECK_BYTES(p->from_client.data, p->from_client.len, "AMQP\0\0\x09\x01", 8);
  p->from_client.len = 0;
}

static inline void peer_start(peer *p, const char *mechanisms) {
  amqp_table_entry_t entry = {
      .key = BYTES("product"),
      .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("peer")}}};
  peer_send(p, 0, CONNECTION_START, connection_start, .version_major = 0, .version_minor = 9,
            .server_properties = {.num_entries = 1, .entries = &entry},
            .mechanisms = BYTES(mechanisms), .locales = BYTES("en_US"));
}

static inline void peer_tune(peer *p, uint16_t channel_max, uint32_t frame_max,
                             uint16_t heartbeat) {
  peer_send(p, 0, CONNECTION_TUNE, connection_tune, .channel_max = channel_max,
            .frame_max = frame_max, .heartbeat = heartbeat);
}

/* The whole handshake, with these wishes of the broker. */
static inline void peer_handshake(peer *p, uint16_t channel_max, uint32_t frame_max,
                                  uint16_t heartbeat) {
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  peer_expect_protocol(p);
  peer_start(p, "PLAIN AMQPLAIN EXTERNAL");
  expect_no_event(p);
  expect(p, 0, CONNECTION_START_OK, connection_start_ok);
  peer_tune(p, channel_max, frame_max, heartbeat);
  expect_no_event(p);
  expect(p, 0, CONNECTION_TUNE_OK, connection_tune_ok);
  expect(p, 0, CONNECTION_OPEN, connection_open);
  peer_send(p, 0, CONNECTION_OPEN_OK, connection_open_ok, .known_hosts = BYTES(""));
  expect_event(p, MR_EV_OPEN);
  CHECK(mr_engine_is_open(p->engine));
  p->frame_max = mr_engine_tuned(p->engine).frame_max;
}

/* An open connection, RabbitMQ's defaults, no heartbeats. */
static inline peer *peer_open_with(const mr_config *config) {
  peer *p = peer_new(config);
  peer_handshake(p, 2047, 131072, 0);
  return p;
}

static inline peer *peer_open(void) {
  mr_config config = peer_config();
  return peer_open_with(&config);
}

static inline mr_channel *peer_channel(peer *p) {
  mr_channel *channel = NULL;
  CHECK_EQ(mr_channel_open(p->engine, &channel), MR_OK);
  CHECK(channel != NULL);
  expect(p, mr_channel_id(channel), CHANNEL_OPEN, channel_open);
  peer_send(p, mr_channel_id(channel), CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES(""));
  expect_reply(p, channel, CHANNEL_OPEN_OK);
  CHECK(mr_channel_is_open(channel));
  return channel;
}

static inline mr_channel *peer_confirm_channel(peer *p) {
  mr_channel *channel = peer_channel(p);
  CHECK_EQ(call(channel, CONFIRM_SELECT, confirm_select, .nowait = 0), MR_OK);
  expect(p, mr_channel_id(channel), CONFIRM_SELECT, confirm_select);
  peer_send(p, mr_channel_id(channel), CONFIRM_SELECT_OK, confirm_select_ok, .dummy = 0);
  expect_reply(p, channel, CONFIRM_SELECT_OK);
  CHECK(mr_channel_is_confirm(channel));
  return channel;
}

static inline void peer_qos(peer *p, mr_channel *channel, uint16_t prefetch) {
  CHECK(call(channel, BASIC_QOS, basic_qos, .prefetch_count = prefetch) >= 0);
  expect(p, mr_channel_id(channel), BASIC_QOS, basic_qos);
  peer_send(p, mr_channel_id(channel), BASIC_QOS_OK, basic_qos_ok, .dummy = 0);
  expect_reply(p, channel, BASIC_QOS_OK);
}

static inline void peer_consume(peer *p, mr_channel *channel, const char *tag, uint32_t ref,
                                bool no_ack) {
  amqp_basic_consume_t consume = {
      .queue = BYTES("q"), .consumer_tag = BYTES(tag), .no_ack = no_ack};
  CHECK_EQ(mr_consume(channel, &consume, ref), MR_OK);
  expect(p, mr_channel_id(channel), BASIC_CONSUME, basic_consume);
  peer_send(p, mr_channel_id(channel), BASIC_CONSUME_OK, basic_consume_ok,
            .consumer_tag = BYTES(tag));
  expect_reply(p, channel, BASIC_CONSUME_OK);
}

/* The connection must end now, for a fault of this kind. */
static inline mr_error *peer_expect_closed(peer *p, mr_kind kind, const char *file, int line) {
  mr_event *ev = peer_expect_event(p, MR_EV_CLOSED, file, line);
  if (ev->error.kind != kind)
    check_fail(file, line, "closed as %d (%s), not %d", ev->error.kind, ev->error.text, kind);
  if (!ev->error.text[0]) check_fail(file, line, "closed without a reason");
  if (!memchr(ev->error.text, 0, sizeof ev->error.text))
    check_fail(file, line, "the reason has no end");
  CHECK(!mr_engine_is_open(p->engine));
  CHECK_EQ(mr_engine_next(p->engine, &(mr_event){.type = MR_EV_OPEN}), MR_EV_NONE);
  return &ev->error;
}
#define expect_closed(p, kind) peer_expect_closed(p, kind, __FILE__, __LINE__)

/* A publish of `body` to exchange "x" with key "k". */
static inline mr_status peer_publish(mr_channel *channel, bool mandatory, const char *body,
                                     uint64_t *seq) {
  return mr_publish(channel,
                    &(mr_publish_args){.exchange = BYTES("x"),
                                       .routing_key = BYTES("k"),
                                       .mandatory = mandatory,
                                       .body = BYTES(body)},
                    seq);
}

#endif
