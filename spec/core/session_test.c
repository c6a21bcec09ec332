/* The open connection: frames in any pieces, contents, closes, flow, heartbeats and other time. */
#include "peer.h"
/* keep behind the headers above */
#include "malloc_hook.h"

/* ---- the same bytes in any pieces ---- */

typedef struct {
  char *text;
  size_t len;
} transcript;

__attribute__((format(printf, 2, 3))) static void note(transcript *t, const char *format, ...) {
  va_list args;
  char *more = realloc(t->text, t->len + 1000);
  if (!more) abort();
  t->text = more;
  va_start(args, format);
  t->len += (size_t)vsnprintf(t->text + t->len, 1000, format, args);
  va_end(args);
}

static uint64_t digest(amqp_bytes_t bytes) {
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < bytes.len; i++)
    hash = (hash ^ ((const uint8_t *)bytes.bytes)[i]) * 1099511628211u;
  return hash;
}

static void note_event(transcript *t, const mr_event *ev) {
  const mr_content *c = &ev->content;
  note(t, "%d on %d: ", ev->type, ev->channel ? mr_channel_id(ev->channel) : 0);
  switch (ev->type) {
    case MR_EV_REPLY: {
      uint8_t bytes[600];
      int n = ev->method.decoded
                  ? amqp_encode_method(ev->method.id, ev->method.decoded,
                                       (amqp_bytes_t){.len = sizeof bytes, .bytes = bytes})
                  : 0;
      CHECK(n >= 0);
      note(t, "%08x %016" PRIx64, (unsigned)ev->method.id,
           digest((amqp_bytes_t){.len = (size_t)n, .bytes = bytes}));
      break;
    }
    case MR_EV_DELIVER:
    case MR_EV_GET_OK:
    case MR_EV_RETURN:
      note(t,
           "%" PRIu64 " %d %d %u %u '%.*s' '%.*s' '%.*s' %d '%.*s' %" PRIu64
           " props %zu %016" PRIx64 " body %zu %016" PRIx64,
           c->delivery_tag, c->redelivered, c->no_ack, c->message_count, c->consumer_ref,
           (int)c->consumer_tag.len, (char *)c->consumer_tag.bytes, (int)c->exchange.len,
           (char *)c->exchange.bytes, (int)c->routing_key.len, (char *)c->routing_key.bytes,
           c->reply_code, (int)c->reply_text.len, (char *)c->reply_text.bytes, c->seq, c->props.len,
           digest(c->props), c->body.len, digest(c->body));
      break;
    case MR_EV_CONFIRM:
      note(t, "%" PRIu64 "..%" PRIu64 " %d", ev->confirm.first, ev->confirm.last,
           ev->confirm.outcome);
      break;
    case MR_EV_CONSUMER_CANCEL:
      note(t, "'%.*s' %u", (int)ev->consumer_tag.len, (char *)ev->consumer_tag.bytes,
           ev->consumer_ref);
      break;
    case MR_EV_FLOW: note(t, "%d", ev->active); break;
    case MR_EV_BLOCKED: note(t, "'%.*s'", (int)ev->text.len, (char *)ev->text.bytes); break;
    case MR_EV_CHANNEL_CLOSED:
    case MR_EV_CLOSED:
      note(t, "%d %d %d %d '%s'", ev->error.kind, ev->error.code, ev->error.class_id,
           ev->error.method_id, ev->error.text);
      break;
    default: break;
  }
  note(t, "\n");
}

/* A session with everything a broker says, its contents of three channels interleaved. */
static transcript everything(peer_split split) {
  mr_config config = peer_config();
  amqp_table_entry_t entry = {
      .key = BYTES("h"), .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("v")}}};
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG | AMQP_BASIC_CONTENT_TYPE_FLAG,
                                   .content_type = BYTES("ct"),
                                   .headers = {.num_entries = 1, .entries = &entry}};
  static uint8_t big[30000];
  transcript t = {0};
  mr_channel *a, *b, *c;
  peer *p;
  for (size_t i = 0; i < sizeof big; i++) big[i] = (uint8_t)(i * 7);
  config.frame_max = 4096;
  p = peer_open_with(&config);
  a = peer_channel(p);
  b = peer_confirm_channel(p);
  c = peer_channel(p);
  peer_consume(p, a, "consumer-a", 11, false);
  peer_consume(p, c, "consumer-c", 13, true);
  for (int i = 0; i < 5; i++) CHECK(peer_publish(b, true, "b", NULL) >= 0);
  CHECK(mr_get(a, BYTES("q"), false) >= 0);
  CHECK(mr_get(a, BYTES("q"), false) >= 0);
  CHECK(call(a, QUEUE_DECLARE, queue_declare, .queue = BYTES("q")) >= 0);
  CHECK(mr_engine_update_secret(p->engine, BYTES("s"), BYTES("r")) >= 0);
  peer_discard(p);
  p->split = split;

  peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("consumer-a"),
            .delivery_tag = 1, .redelivered = 1, .exchange = BYTES("exchange"),
            .routing_key = BYTES("key"));
  peer_send(p, 3, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("consumer-c"),
            .delivery_tag = 1);
  peer_header(p, 3, 9000, &props);
  peer_send(p, 2, BASIC_RETURN, basic_return, .reply_code = 313,
            .reply_text = BYTES("NO_CONSUMERS"));
  peer_body(p, 3, big, 4000);
  peer_header(p, 1, 3, NULL);
  peer_heartbeat(p);
  peer_body(p, 3, big + 4000, 0);
  peer_header(p, 2, 5000, &props);
  peer_send(p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = BYTES("low on memory"));
  peer_body(p, 2, big, 4088);
  peer_body(p, 3, big + 4000, 4088);
  peer_body(p, 1, "abc", 3);
  peer_method(p, 0, MR_CONNECTION_UPDATE_SECRET_OK, NULL);
  peer_body(p, 2, big + 4088, 912);
  peer_body(p, 3, big + 8088, 912);
  peer_send(p, 0, CONNECTION_UNBLOCKED, connection_unblocked, .dummy = 0);
  peer_ack(p, 2, 2, true);
  peer_nack(p, 2, 4, false);
  peer_ack(p, 2, 3, false);
  peer_send(p, 1, BASIC_GET_OK, basic_get_ok, .delivery_tag = 2, .message_count = 9);
  peer_content(p, 1, &props, big, sizeof big);
  peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES(""));
  peer_send(p, 1, QUEUE_DECLARE_OK, queue_declare_ok, .queue = BYTES("q"), .message_count = 3);
  for (uint64_t tag = 3; tag < 40; tag++)
    peer_deliver(p, 1, "consumer-a", tag, tag % 3 ? "some body" : "");
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("consumer-a"), .nowait = 1);
  peer_send(p, 3, CHANNEL_FLOW, channel_flow, .active = 0);
  peer_send(p, 3, CHANNEL_FLOW, channel_flow, .active = 1);
  peer_send(p, 2, CHANNEL_CLOSE, channel_close, .reply_code = 404, .reply_text = BYTES("NOT_FOUND"),
            .class_id = 60, .method_id = 40);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 320,
            .reply_text = BYTES("CONNECTION_FORCED"));
  while (peer_next(p) != MR_EV_NONE) note_event(&t, &p->event);
  CHECK(p->closed);
  mr_channel_release(a);
  mr_channel_release(b);
  mr_channel_release(c);
  peer_free(p);
  return t;
}

static void the_pieces_of_the_input_do_not_matter(void) {
  transcript whole = everything(PEER_WHOLE);
  for (int i = 0; i < 30; i++) {
    transcript t = everything(i == 0 ? PEER_BYTES : PEER_RANDOM);
    if (strcmp(t.text, whole.text) != 0)
      FAIL("events differ:\n%.300s\n---\n%.300s", whole.text, t.text);
    free(t.text);
  }
  CHECK(strstr(whole.text, "CONNECTION_FORCED"));
  CHECK(strstr(whole.text, "'exchange' 'key'"));
  free(whole.text);
}

static void the_handshake_in_pieces(void) {
  for (int i = 0; i < 20; i++) {
    mr_config config = peer_config();
    peer *p = peer_new(&config);
    p->split = i ? PEER_RANDOM : PEER_BYTES;
    peer_handshake(p, 5, 4096, 10);
    peer_free(p);
  }
}

/* ---- contents ---- */

static void bodies_of_every_size_arrive(void) {
  mr_config config = peer_config();
  static uint8_t body[60000];
  size_t sizes[] = {0,    1, 4096 - 9, 4096 - 8, 4096 - 7, 2 * 4088 - 1, 2 * 4088, 2 * 4088 + 1,
                    60000};
  peer *p;
  mr_channel *channel;
  uint64_t tag = 0;
  config.frame_max = 4096;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  peer_consume(p, channel, "c", 1, false);
  for (size_t i = 0; i < sizeof body; i++) body[i] = (uint8_t)check_random();
  for (int split = PEER_WHOLE; split <= PEER_RANDOM; split++)
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
      mr_event *ev;
      p->split = (peer_split)split;
      peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"),
                .delivery_tag = ++tag);
      peer_content(p, 1, NULL, body, sizes[i]);
      ev = expect_event(p, MR_EV_DELIVER);
      CHECK_BYTES(ev->content.body.bytes, ev->content.body.len, body, sizes[i]);
      CHECK_BYTES(ev->content.props.bytes, ev->content.props.len, "\0\0", 2);
    }
  mr_channel_release(channel);
  peer_free(p);
}

/* Else a broker could have memory set aside on every channel by announcing bodies that never come. */
static void room_grows_with_what_has_come(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  char piece[1000] = "";
  peer_consume(p, channel, "c", 1, false);
  peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = 1);
  peer_header(p, 1, 100 << 20, NULL);
  peer_body(p, 1, piece, sizeof piece);
  hook.largest = 0;
  hook.on = true;
  mr_event_type type = peer_next(p);
  hook.on = false;
  CHECK_EQ(type, MR_EV_NONE);
  CHECK(hook.largest < 65536);
  mr_channel_release(channel);
  peer_free(p);
}

static void declare_many(peer *p, mr_channel *channel, int n) {
  for (int i = 0; i < n; i++) {
    call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"));
    peer_discard(p);
    peer_send(p, 1, QUEUE_DECLARE_OK, queue_declare_ok, .queue = BYTES("q"));
    CHECK_EQ(peer_next(p), MR_EV_REPLY);
  }
}

static void what_an_event_shows_is_freed_with_the_next(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  declare_many(p, channel, 10); /* buffers have their size */
  hook.live = 0;
  hook.on = true;
  declare_many(p, channel, 1000);
  hook.on = false;
  CHECK_EQ(hook.live, 0);
  mr_channel_release(channel);
  peer_free(p);
}

static void empty_body_frames_are_nothing(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  peer_consume(p, channel, "c", 1, false);
  for (uint64_t tag = 1; tag <= 3; tag++) {
    peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = tag);
    peer_header(p, 1, 4, NULL);
    peer_body(p, 1, "", 0);
    peer_body(p, 1, "a", 1);
    peer_body(p, 1, "", 0);
    peer_body(p, 1, "bcd", 3);
    CHECK_TEXT(expect_event(p, MR_EV_DELIVER)->content.body, "abcd");
  }
  mr_channel_release(channel);
  peer_free(p);
}

static void a_delivery_for_nobody_is_a_protocol_error(void) {
  for (int what = 0; what < 4; what++) {
    peer *p = peer_open();
    mr_channel *channel = peer_channel(p);
    peer_consume(p, channel, "c", 1, false);
    switch (what) {
      case 0: peer_deliver(p, 1, "d", 1, "b"); break;
      case 1: peer_deliver(p, 2, "c", 1, "b"); break;
      case 2: peer_deliver(p, 0, "c", 1, "b"); break;
      case 3: peer_deliver(p, 1, "", 1, "b"); break;
    }
    expect_closed(p, MR_KIND_PROTOCOL);
    mr_channel_release(channel);
    peer_free(p);
  }
}

static void frames_out_of_place_are_a_protocol_error(void) {
  for (int what = 0; what < 10; what++) {
    peer *p = peer_open();
    mr_channel *channel = peer_channel(p);
    mr_error *error;
    peer_consume(p, channel, "c", 1, false);
    if (what < 6 || what == 9)
      peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = 1);
    switch (what) {
      case 0: peer_body(p, 1, "b", 1); break;         /* no header */
      case 1: peer_deliver(p, 1, "c", 2, "b"); break; /* a second method */
      case 2:
        peer_header(p, 1, 1, NULL);
        peer_header(p, 1, 1, NULL);
        break; /* a second header */
      case 3:
        peer_header(p, 1, 1, NULL);
        peer_body(p, 1, "bb", 2);
        break; /* too much body */
      case 4:
        peer_header(p, 1, 2, NULL);
        peer_ack(p, 1, 1, false);
        break;                                            /* a method within */
      case 5: peer_header_raw(p, 1, 1, BYTES("")); break; /* no flags */
      case 6: peer_header(p, 1, 1, NULL); break;
      case 7: peer_body(p, 1, "b", 1); break;
      case 8: peer_body(p, 0, "b", 1); break;
      case 9: peer_header_raw(p, 1, 1, BYTES("\x80\x10xyz")); break; /* a string cut off */
    }
    error = expect_closed(p, MR_KIND_PROTOCOL);
    CHECK(error->code >= 500);
    expect(p, 0, CONNECTION_CLOSE, connection_close);
    mr_channel_release(channel);
    peer_free(p);
  }
}

static void malformed_frames_are_a_protocol_error(void) {
  static const struct {
    const char *bytes;
    size_t n;
  } frames[] = {
      {"\x08\0\0\0\0\0\0\xCD", 8},          /* no end */
      {"\x02\0\1\0\0\0\0\xCE", 8},          /* an empty header */
      {"\x01\0\1\0\0\0\0\xCE", 8},          /* an empty method */
      {"\x01\0\1\0\0\0\3\0\x3C\0\xCE", 11}, /* half a method */
      {"\x08\0\1\0\0\0\0\xCE", 8},          /* a heartbeat on a channel */
      {"\x08\0\0\0\0\0\1\0\xCE", 9},        /* a heartbeat with bytes */
      {"\x00\0\0\0\0\0\0\xCE", 8},          /* unknown types */
      {"\x04\0\0\0\0\0\0\xCE", 8},
      {"\xFF\0\0\0\0\0\0\xCE", 8},
      {"\x03\0\1\xFF\xFF\xFF\xFF", 7}, /* far over frame_max: refused before it is read */
      {"\x03\0\1\0\2\0\0", 7},         /* 131072 + 8 */
      {"\x01\0\1\0\0\0\x0D\0\x3C\0\x50\0\0\0\0\0\0\0\1\0\0\xCE",
       22}, /* bytes behind the arguments */
  };
  for (int split = PEER_WHOLE; split <= PEER_BYTES; split++)
    for (size_t i = 0; i < sizeof frames / sizeof *frames; i++) {
      peer *p = peer_open();
      mr_channel *channel = peer_confirm_channel(p);
      p->split = (peer_split)split;
      CHECK(peer_publish(channel, false, "b", NULL) >= 0);
      peer_discard(p);
      peer_bytes(&p->to_client, frames[i].bytes, frames[i].n);
      while (peer_next(p) == MR_EV_CONFIRM) {}
      if (p->event.type != MR_EV_CLOSED) FAIL("frame %zu was taken", i);
      CHECK_EQ(p->event.error.kind, MR_KIND_PROTOCOL);
      mr_channel_release(channel);
      peer_free(p);
    }
}

/* Every method of a broker, cut at every place, must be refused and nothing else. */
static void every_truncation_of_a_method_is_refused(void) {
  static amqp_table_entry_t entry = {.key = {.len = 1, .bytes = (void *)(uintptr_t) "k"},
                                     .value = {.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = 3}}};
  struct {
    uint16_t channel;
    amqp_method_number_t method;
    void *decoded;
  } methods[] = {
      {0, AMQP_CONNECTION_CLOSE_METHOD, &(amqp_connection_close_t){.reply_text = BYTES("why")}},
      {0, AMQP_CONNECTION_BLOCKED_METHOD, &(amqp_connection_blocked_t){.reason = BYTES("why")}},
      {1, AMQP_CHANNEL_FLOW_METHOD, &(amqp_channel_flow_t){.active = 1}},
      {1, AMQP_CHANNEL_CLOSE_METHOD, &(amqp_channel_close_t){.reply_text = BYTES("why")}},
      {1, AMQP_QUEUE_DECLARE_OK_METHOD, &(amqp_queue_declare_ok_t){.queue = BYTES("queue")}},
      {1, AMQP_BASIC_RETURN_METHOD,
       &(amqp_basic_return_t){
           .reply_text = BYTES("a"), .exchange = BYTES("b"), .routing_key = BYTES("c")}},
      {1, AMQP_BASIC_DELIVER_METHOD,
       &(amqp_basic_deliver_t){.consumer_tag = BYTES("c"),
                               .delivery_tag = 1,
                               .exchange = BYTES("b"),
                               .routing_key = BYTES("c")}},
      {1, AMQP_BASIC_CANCEL_METHOD, &(amqp_basic_cancel_t){.consumer_tag = BYTES("c")}},
      {1, AMQP_BASIC_ACK_METHOD, &(amqp_basic_ack_t){.delivery_tag = 1}},
      {1, AMQP_BASIC_NACK_METHOD, &(amqp_basic_nack_t){.delivery_tag = 1}},
  };
  for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
    uint8_t bytes[300];
    int n = amqp_encode_method(methods[i].method, methods[i].decoded,
                               (amqp_bytes_t){.len = 290, .bytes = bytes + 4});
    CHECK(n > 0);
    peer_be(bytes, methods[i].method, 4);
    for (int cut = 0; cut < n; cut++) {
      peer *p = peer_open();
      mr_channel *channel = peer_confirm_channel(p);
      peer_consume(p, channel, "c", 1, false);
      CHECK(peer_publish(channel, false, "b", NULL) >= 0);
      CHECK(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("queue")) >= 0);
      peer_frame_of(p, AMQP_FRAME_METHOD, methods[i].channel, bytes, (size_t)cut + 4);
      expect_closed(p, MR_KIND_PROTOCOL);
      mr_channel_release(channel);
      peer_free(p);
    }
  }
  /* Start, with its tables */
  amqp_table_t table = {.num_entries = 1, .entries = &entry};
  uint8_t bytes[300];
  int n = amqp_encode_method(AMQP_CONNECTION_START_METHOD,
                             &(amqp_connection_start_t){.version_minor = 9,
                                                        .server_properties = table,
                                                        .mechanisms = BYTES("PLAIN"),
                                                        .locales = BYTES("en_US")},
                             (amqp_bytes_t){.len = 290, .bytes = bytes + 4});
  CHECK(n > 0);
  peer_be(bytes, AMQP_CONNECTION_START_METHOD, 4);
  for (int cut = 0; cut < n; cut++) {
    mr_config config = peer_config();
    peer *p = peer_new(&config);
    CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
    peer_frame_of(p, AMQP_FRAME_METHOD, 0, bytes, (size_t)cut + 4);
    expect_closed(p, MR_KIND_PROTOCOL);
    peer_free(p);
  }
}

static void a_message_over_max_message_size_is_refused(void) {
  mr_config config = peer_config();
  peer *p;
  mr_channel *channel;
  static char body[1001];
  config.max_message_size = 1000;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  peer_consume(p, channel, "c", 1, false);
  peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = 1);
  peer_content(p, 1, NULL, body, 1000);
  CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.body.len, 1000);
  peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = 2);
  peer_header(p, 1, 1001, NULL); /* refused at the header, not when it has come */
  expect_closed(p, MR_KIND_PROTOCOL);
  mr_channel_release(channel);
  peer_free(p);
  p = peer_open();
  channel = peer_channel(p);
  peer_consume(p, channel, "c", 1, false);
  peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = 1);
  peer_header(p, 1, UINT64_MAX, NULL);
  expect_closed(p, MR_KIND_PROTOCOL);
  mr_channel_release(channel);
  peer_free(p);
}

/* ---- back-pressure ---- */

static void a_caller_that_stops_asking_stops_reading(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  size_t space, fed = 0;
  uint8_t *place;
  peer_consume(p, channel, "c", 1, false);
  for (uint64_t tag = 1; tag <= 20000; tag++)
    peer_deliver(p, 1, "c", tag, "0123456789012345678901234567890123456789");
  while (fed < p->to_client.len) {
    size_t n = mr_engine_feed(p->engine, p->to_client.data + fed, p->to_client.len - fed, p->now);
    if (n == 0) break;
    fed += n;
  }
  CHECK(fed < p->to_client.len);
  CHECK(fed < 1 << 20); /* bounded, whatever the peer sends */
  CHECK(mr_engine_rx_reserve(p->engine, &space) == NULL);
  CHECK_EQ(space, 0);
  p->to_client.pos = fed;
  for (uint64_t tag = 1; tag <= 20000; tag++)
    CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.delivery_tag, tag);
  place = mr_engine_rx_reserve(p->engine, &space);
  CHECK(place && space > 0);
  mr_channel_release(channel);
  peer_free(p);
}

/* The engine's answers are bounded too: a broker that asks and does not read cannot fill memory. */
static void answers_to_a_flood_are_bounded(void) {
  mr_config config = peer_config();
  mr_channel *channel;
  peer *p;
  config.max_buffer = 1 << 20;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  for (int i = 0; i < 300; i++) {
    p->to_client.len = p->to_client.pos = 0;
    for (int k = 0; k < 1000; k++) peer_send(p, 1, CHANNEL_FLOW, channel_flow, .active = 1);
    for (size_t fed = 0; fed < p->to_client.len;) {
      mr_event ev;
      size_t n = mr_engine_feed(p->engine, p->to_client.data + fed, p->to_client.len - fed, p->now);
      while (mr_engine_next(p->engine, &ev) == MR_EV_FLOW) {}
      if (n == 0) goto stopped; /* by back-pressure or an end: both are an answer */
      fed += n;
    }
  }
stopped:
  CHECK(mr_engine_tx_pending(p->engine) < 3u << 20);
  mr_channel_release(channel);
  peer_free(p);
}

/* ---- channels ---- */

static void numbers_are_used_again(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p), *b = peer_channel(p), *c;
  CHECK_EQ(mr_channel_id(a), 1);
  CHECK_EQ(mr_channel_id(b), 2);
  CHECK_EQ(mr_channel_close(a, 200, "bye"), MR_OK);
  CHECK(!mr_channel_is_open(a));
  expect(p, 1, CHANNEL_CLOSE, channel_close);
  c = peer_channel(p); /* 1 is still waiting for close-ok */
  CHECK_EQ(mr_channel_id(c), 3);
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_reply(p, a, CHANNEL_CLOSE_OK);
  mr_channel_release(a);
  a = peer_channel(p);
  CHECK_EQ(mr_channel_id(a), 1);
  mr_channel_release(a);
  mr_channel_release(b);
  mr_channel_release(c);
  peer_free(p);
}

static void a_channel_that_the_broker_closes_has_ended(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p), *b;
  for (uint16_t id = 1; id <= 50; id++) {
    mr_event *ev;
    CHECK(peer_publish(a, true, "b", NULL) >= 0);
    peer_consume((peer_discard(p), p), a, "c", 1, false);
    CHECK(call(a, QUEUE_PURGE, queue_purge, .queue = BYTES("none")) >= 0);
    peer_discard(p);
    peer_send(p, id, CHANNEL_CLOSE, channel_close, .reply_code = 404,
              .reply_text = BYTES("NOT_FOUND - no queue 'none'"), .class_id = 50, .method_id = 30);
    ev = expect_event(p, MR_EV_CHANNEL_CLOSED);
    CHECK(ev->channel == a);
    CHECK_EQ(ev->error.kind, MR_KIND_CHANNEL);
    CHECK_EQ(ev->error.code, 404);
    CHECK_EQ(ev->error.class_id, 50);
    CHECK_EQ(ev->error.method_id, 30);
    CHECK(strstr(ev->error.text, "no queue 'none'"));
    expect(p, id, CHANNEL_CLOSE_OK, channel_close_ok);
    CHECK(!mr_channel_is_open(a));
    CHECK_EQ(call(a, QUEUE_PURGE, queue_purge, .queue = BYTES("none")), MR_CLOSED);
    CHECK_EQ(mr_get(a, BYTES("q"), false), MR_CLOSED);
    CHECK_EQ(mr_channel_close(a, 200, ""), MR_CLOSED);
    CHECK_EQ(mr_channel_id(a), id);
    b = peer_confirm_channel(p); /* nothing of the old one's, nor its number */
    CHECK_EQ(mr_channel_id(b), id + 1);
    CHECK_EQ(mr_confirm_next(b), 1);
    CHECK_EQ(mr_unsettled(b), 0);
    mr_channel_release(a);
    a = b;
  }
  mr_channel_release(a);
  peer_free(p);
}

static void closes_that_cross(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p), *b;
  CHECK(peer_publish(a, false, "b", NULL) >= 0);
  peer_discard(p);
  CHECK_EQ(mr_channel_close(a, 200, "bye"), MR_OK);
  expect(p, 1, CHANNEL_CLOSE, channel_close);
  peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 406,
            .reply_text = BYTES("PRECONDITION_FAILED"));
  expect_event(p, MR_EV_CHANNEL_CLOSED);
  expect(p, 1, CHANNEL_CLOSE_OK, channel_close_ok);
  CHECK_EQ(mr_confirm_outcome(a, 1), MR_LOST);
  CHECK_EQ(mr_confirm_unsettled(a), 0);
  b = peer_channel(p);
  CHECK_EQ(mr_channel_id(b), 2); /* the broker still owes the close-ok of 1 */
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_no_event(p);
  mr_channel_release(b);
  peer_discard(p);
  peer_send(p, 2, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_no_event(p);
  b = peer_channel(p);
  CHECK_EQ(mr_channel_id(b), 2); /* 1 rests: the broker closed it */
  mr_channel_release(a);
  mr_channel_release(b);
  peer_free(p);
}

static void broker_closes(peer *p, uint16_t id) {
  peer_send(p, id, CHANNEL_CLOSE, channel_close, .reply_code = 406,
            .reply_text = BYTES("PRECONDITION_FAILED - delivery acknowledgement timed out"));
}

/* RabbitMQ closes a channel again at each look at its ack timeouts until it has read our answer. A
 * second close-ok would be the first method of a new channel to it, and that ends the connection. */
static void further_closes_of_a_channel_are_passed_over(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p), *b;
  peer_consume(p, a, "c", 1, false);
  peer_discard(p);
  broker_closes(p, 1);
  broker_closes(p, 1);
  expect_event(p, MR_EV_CHANNEL_CLOSED);
  expect(p, 1, CHANNEL_CLOSE_OK, channel_close_ok);
  expect_no_event(p);
  b = peer_channel(p);
  CHECK_EQ(mr_channel_id(b), 2);
  broker_closes(p, 1);
  peer_send(p, 1, BASIC_CONSUME_OK, basic_consume_ok, .consumer_tag = BYTES("d"));
  peer_deliver(p, 1, "c", 1, "b");
  expect_no_event(p);
  expect_nothing(p);
  CHECK(mr_engine_is_open(p->engine));
  CHECK(mr_channel_is_open(b));
  mr_channel_release(a);
  broker_closes(p, 1);
  expect_no_event(p);
  broker_closes(p, 2);
  CHECK(expect_event(p, MR_EV_CHANNEL_CLOSED)->channel == b);
  expect(p, 2, CHANNEL_CLOSE_OK, channel_close_ok);
  mr_channel_release(b);
  broker_closes(p, 3); /* which was never open */
  CHECK_EQ(expect_event(p, MR_EV_CLOSED)->error.code, 504);
  peer_free(p);
}

static void the_number_of_a_channel_that_the_broker_closed_rests(void) {
  mr_config config = peer_config();
  mr_channel *channels[3], *more;
  peer *p;
  config.channel_max = 3;
  p = peer_open_with(&config);
  for (int i = 0; i < 2; i++) channels[i] = peer_channel(p);
  for (uint16_t id = 2; id >= 1; id--) {
    broker_closes(p, id);
    expect_event(p, MR_EV_CHANNEL_CLOSED);
    expect(p, id, CHANNEL_CLOSE_OK, channel_close_ok);
    mr_channel_release(channels[id - 1]);
  }
  channels[2] = peer_channel(p);
  CHECK_EQ(mr_channel_id(channels[2]), 3);
  more = peer_channel(p); /* none else is left: the one that has rested longest */
  CHECK_EQ(mr_channel_id(more), 2);
  broker_closes(p, 2); /* now it is this one's */
  CHECK(expect_event(p, MR_EV_CHANNEL_CLOSED)->channel == more);
  expect(p, 2, CHANNEL_CLOSE_OK, channel_close_ok);
  mr_channel_release(more);
  more = peer_channel(p);
  CHECK_EQ(mr_channel_id(more), 1);
  mr_channel_release(channels[2]);
  mr_channel_release(more);
  peer_free(p);
}

/* A program whose channels are closed again and again does not use ever higher numbers. */
static void numbers_do_not_rest_for_ever(void) {
  peer *p = peer_open();
  uint16_t highest = 0;
  for (int i = 0; i < 2000; i++) {
    mr_channel *a = peer_channel(p);
    uint16_t id = mr_channel_id(a);
    if (id > highest) highest = id;
    broker_closes(p, id);
    expect_event(p, MR_EV_CHANNEL_CLOSED);
    peer_discard(p);
    mr_channel_release(a);
  }
  CHECK(highest > 200);
  CHECK(highest <= 257);
  peer_free(p);
}

/* Its owner was told that it ended: what a broker still says of it is nobody's business. */
static void nothing_is_told_of_a_channel_whose_end_was_told(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p), *b;
  peer_consume(p, a, "c", 1, false);
  CHECK(call(a, QUEUE_PURGE, queue_purge, .queue = BYTES("q")) >= 0);
  CHECK(peer_publish(a, false, "b", NULL) >= 0);
  CHECK(mr_channel_close(a, 200, "bye") >= 0);
  peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 404,
            .reply_text = BYTES("NOT_FOUND"));
  expect_event(p, MR_EV_CHANNEL_CLOSED);
  peer_discard(p);
  peer_send(p, 1, CHANNEL_FLOW, channel_flow, .active = 0);
  expect_no_event(p);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"), .nowait = 1);
  expect_no_event(p);
  peer_ack(p, 1, 1, false);
  peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = 1);
  peer_deliver(p, 1, "c", 1, "b");
  expect_no_event(p);
  peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 406, .reply_text = BYTES("again"));
  expect_no_event(p);
  CHECK(mr_engine_is_open(p->engine));
  CHECK_EQ(mr_confirm_outcome(a, 1), MR_LOST);
  peer_discard(p);
  b = peer_channel(p);
  CHECK_EQ(mr_channel_id(b), 2); /* the close-ok of 1 is still due */
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_no_event(p);
  mr_channel_release(a);
  a = peer_channel(p);
  CHECK_EQ(mr_channel_id(a), 3); /* 1 rests: the broker closed it */
  mr_channel_release(a);
  mr_channel_release(b);
  peer_free(p);
}

static void a_channel_refused_at_open(void) {
  peer *p = peer_open();
  mr_channel *a = NULL;
  CHECK_EQ(mr_channel_open(p->engine, &a), MR_OK);
  peer_discard(p);
  peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 504,
            .reply_text = BYTES("CHANNEL_ERROR"));
  expect_event(p, MR_EV_CHANNEL_CLOSED);
  expect(p, 1, CHANNEL_CLOSE_OK, channel_close_ok);
  CHECK(!mr_channel_is_open(a));
  mr_channel_release(a);
  peer_free(p);
}

/* Commands may be queued behind channel.open. */
static void a_channel_can_be_used_before_open_ok(void) {
  peer *p = peer_open();
  mr_channel *a = NULL;
  uint64_t seq = 0;
  CHECK_EQ(mr_channel_open(p->engine, &a), MR_OK);
  CHECK_EQ(call(a, CONFIRM_SELECT, confirm_select, .nowait = 0), MR_OK);
  CHECK(peer_publish(a, true, "b", &seq) >= 0);
  CHECK_EQ(seq, 1);
  peer_discard(p);
  peer_send(p, 1, CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES(""));
  peer_send(p, 1, CONFIRM_SELECT_OK, confirm_select_ok, .dummy = 0);
  peer_ack(p, 1, 1, false);
  expect_reply(p, a, CHANNEL_OPEN_OK);
  expect_reply(p, a, CONFIRM_SELECT_OK);
  CHECK_EQ(expect_event(p, MR_EV_CONFIRM)->confirm.last, 1);
  mr_channel_release(a);
  peer_free(p);
}

static void channel_max_is_obeyed(void) {
  mr_config config = peer_config();
  mr_channel *channels[3], *extra = NULL;
  peer *p;
  config.channel_max = 3;
  p = peer_open_with(&config);
  for (int i = 0; i < 3; i++) channels[i] = peer_channel(p);
  CHECK_EQ(mr_channel_open(p->engine, &extra), MR_NO_CHANNELS);
  CHECK(extra == NULL);
  expect_nothing(p);
  CHECK_EQ(mr_channel_close(channels[1], 200, "bye"), MR_OK);
  CHECK_EQ(mr_channel_open(p->engine, &extra), MR_NO_CHANNELS);
  peer_discard(p);
  peer_send(p, 2, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_reply(p, channels[1], CHANNEL_CLOSE_OK);
  extra = peer_channel(p);
  CHECK_EQ(mr_channel_id(extra), 2);
  for (int i = 0; i < 3; i++) mr_channel_release(channels[i]);
  mr_channel_release(extra);
  peer_free(p);
}

static void two_thousand_channels(void) {
  enum { N = 2000 };
  peer *p = peer_open();
  static mr_channel *channels[N];
  for (int i = 0; i < N; i++) {
    CHECK_EQ(mr_channel_open(p->engine, &channels[i]), MR_OK);
    mr_channel_set_user(channels[i], &channels[i]);
  }
  peer_discard(p);
  for (int i = 0; i < N; i++)
    peer_send(p, (uint16_t)(i + 1), CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES(""));
  for (int i = 0; i < N; i++) {
    expect_reply(p, channels[i], CHANNEL_OPEN_OK);
    CHECK(mr_channel_user(p->event.channel) == &channels[i]);
  }
  for (int i = 0; i < N; i++) peer_consume(p, channels[i], "c", (uint32_t)i + 1, false);
  for (int i = N - 1; i >= 0; i--) peer_deliver(p, (uint16_t)(i + 1), "c", 1, "b");
  for (int i = N - 1; i >= 0; i--) {
    CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, i + 1);
    CHECK_EQ(mr_settle(channels[i], 1, MR_SETTLE_ACK, false), MR_OK);
  }
  p->now += 1;
  mr_engine_deadline(p->engine, p->now);
  p->now += 1;
  mr_engine_tick(p->engine, p->now);
  for (int i = 0; i < N; i++) {
    CHECK(peer_take(p, &p->frame));
    CHECK_EQ(p->frame.method, AMQP_BASIC_ACK_METHOD);
  }
  expect_nothing(p);
  for (int i = 0; i < N; i += 2) mr_channel_release(channels[i]);
  peer_free(p);
  for (int i = 1; i < N; i += 2) mr_channel_release(channels[i]); /* after the engine */
}

static void a_released_channel_is_silent(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p), *b = peer_channel(p);
  peer_consume(p, a, "c", 1, false);
  CHECK(peer_publish(a, true, "b", NULL) >= 0);
  CHECK(call(a, QUEUE_PURGE, queue_purge, .queue = BYTES("q")) >= 0);
  CHECK(mr_get(a, BYTES("q"), false) >= 0);
  peer_discard(p);
  peer_deliver(p, 1, "c", 1, "seen");
  expect_event(p, MR_EV_DELIVER);
  mr_channel_release(a);
  expect(p, 1, CHANNEL_CLOSE, channel_close);
  peer_deliver(p, 1, "c", 2, "unseen");
  peer_ack(p, 1, 1, false);
  peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = 0);
  peer_send(p, 1, BASIC_GET_OK, basic_get_ok, .delivery_tag = 3);
  peer_content(p, 1, NULL, "got", 3);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"), .nowait = 1);
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_no_event(p);
  peer_discard(p);
  a = peer_channel(p);
  CHECK_EQ(mr_channel_id(a), 1);
  mr_channel_release(a);
  peer_discard(p);
  peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 404, .reply_text = BYTES("crossed"));
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_no_event(p);
  mr_channel_release(b);
  mr_channel_release(NULL);
  peer_free(p);
}

/* What a closing channel still receives is read and forgotten, or told: never an error. */
static void a_closing_channel_takes_what_is_on_its_way(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p);
  mr_event_type type;
  peer_consume(p, a, "c", 1, false);
  CHECK_EQ(mr_channel_close(a, 200, "bye"), MR_OK);
  peer_deliver(p, 1, "c", 1, "late");
  peer_send(p, 1, CHANNEL_FLOW, channel_flow, .active = 1);
  peer_send(p, 1, BASIC_RETURN, basic_return, .reply_code = 312);
  peer_content(p, 1, NULL, "late", 4);
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  while ((type = peer_next(p)) != MR_EV_REPLY)
    CHECK(type == MR_EV_DELIVER || type == MR_EV_FLOW || type == MR_EV_RETURN);
  CHECK_EQ(p->event.method.id, AMQP_CHANNEL_CLOSE_OK_METHOD);
  mr_channel_release(a);
  peer_free(p);
}

/* ---- cancel, flow, blocked ---- */

static void the_broker_cancels_a_consumer(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p);
  mr_event *ev;
  peer_consume(p, a, "one", 1, false);
  peer_consume(p, a, "two", 2, false);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("one"), .nowait = 1);
  ev = expect_event(p, MR_EV_CONSUMER_CANCEL);
  CHECK(ev->channel == a);
  CHECK_TEXT(ev->consumer_tag, "one");
  CHECK_EQ(ev->consumer_ref, 1);
  expect_nothing(p);
  peer_deliver(p, 1, "two", 1, "b");
  CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, 2);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("two"), .nowait = 0);
  CHECK_EQ(expect_event(p, MR_EV_CONSUMER_CANCEL)->consumer_ref, 2);
  CHECK_TEXT(expect(p, 1, BASIC_CANCEL_OK, basic_cancel_ok)->consumer_tag, "two");
  /* a cancel that crossed one of ours */
  peer_consume(p, a, "three", 3, false);
  CHECK(call(a, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("three")) >= 0);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("three"), .nowait = 1);
  peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("three"));
  if (peer_next(p) == MR_EV_CONSUMER_CANCEL) peer_next(p);
  CHECK_EQ(p->event.type, MR_EV_REPLY);
  peer_discard(p);
  peer_consume(p, a, "one", 4, false); /* the tag is free again */
  mr_channel_release(a);
  peer_free(p);
}

static void a_tag_is_free_after_a_cancel(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p);
  for (uint32_t i = 1; i < 50; i++) {
    peer_consume(p, a, "c", i, false);
    peer_deliver(p, 1, "c", i, "b");
    CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, i);
    if (i % 2) { /* the engine may ask for an answer all the same, but tells nobody */
      amqp_basic_cancel_t *sent;
      CHECK(call(a, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"), .nowait = 1) >= 0);
      sent = expect(p, 1, BASIC_CANCEL, basic_cancel);
      if (!sent->nowait)
        peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("c"));
    } else {
      CHECK(call(a, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c")) >= 0);
      peer_discard(p);
      peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("c"));
      expect_reply(p, a, BASIC_CANCEL_OK);
    }
  }
  mr_channel_release(a);
  peer_free(p);
}

/* Our cancel crossed the broker's, and its answer comes when the tag has a new owner. */
static void a_late_cancel_ok_leaves_the_successor_alone(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p);
  amqp_basic_consume_t again = {.queue = BYTES("q"), .consumer_tag = BYTES("t")};
  peer_consume(p, a, "t", 1, false);
  CHECK(call(a, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("t")) >= 0);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("t"), .nowait = 1);
  CHECK_EQ(expect_event(p, MR_EV_CONSUMER_CANCEL)->consumer_ref, 1);
  CHECK_EQ(mr_consume(a, &again, 2), MR_OK);
  peer_discard(p);
  peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("t"));
  expect_reply(p, a, BASIC_CANCEL_OK);
  peer_send(p, 1, BASIC_CONSUME_OK, basic_consume_ok, .consumer_tag = BYTES("t"));
  expect_reply(p, a, BASIC_CONSUME_OK);
  peer_deliver(p, 1, "t", 1, "b");
  CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, 2);
  CHECK(call(a, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("t")) >= 0);
  peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("t"));
  expect_reply(p, a, BASIC_CANCEL_OK);
  peer_discard(p);
  peer_consume(p, a, "t", 3, false);
  mr_channel_release(a);
  peer_free(p);
}

static void the_brokers_flow_pauses_publishing(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p), *b = peer_confirm_channel(p);
  mr_event *ev;
  peer_send(p, 1, CHANNEL_FLOW, channel_flow, .active = 0);
  ev = expect_event(p, MR_EV_FLOW);
  CHECK(ev->channel == a && !ev->active);
  CHECK(!expect(p, 1, CHANNEL_FLOW_OK, channel_flow_ok)->active);
  CHECK_EQ(peer_publish(a, true, "b", NULL), MR_BLOCKED);
  CHECK(peer_publish(b, true, "b", NULL) >= 0);
  peer_discard(p);
  peer_send(p, 1, CHANNEL_FLOW, channel_flow, .active = 1);
  CHECK(expect_event(p, MR_EV_FLOW)->active);
  CHECK(expect(p, 1, CHANNEL_FLOW_OK, channel_flow_ok)->active);
  CHECK(peer_publish(a, true, "b", NULL) >= 0);
  mr_channel_release(a);
  mr_channel_release(b);
  peer_free(p);
}

static void a_blocked_connection_pauses_publishing(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p);
  mr_route *route = NULL;
  CHECK_EQ(mr_route_new(&(mr_publish_args){.routing_key = BYTES("k")}, &route), MR_OK);
  peer_consume(p, a, "c", 1, false);
  peer_send(p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = BYTES("low on disk"));
  CHECK_TEXT(expect_event(p, MR_EV_BLOCKED)->text, "low on disk");
  CHECK(mr_engine_is_blocked(p->engine));
  CHECK_EQ(peer_publish(a, true, "b", NULL), MR_BLOCKED);
  CHECK_EQ(mr_publish_route(a, route, BYTES("b"), NULL), MR_BLOCKED);
  CHECK_EQ(mr_confirm_next(a), 1);
  peer_deliver(p, 1, "c", 1, "b"); /* consuming goes on */
  expect_event(p, MR_EV_DELIVER);
  CHECK(mr_settle(a, 1, MR_SETTLE_NACK, true) >= 0);
  expect(p, 1, BASIC_NACK, basic_nack);
  peer_send(p, 0, CONNECTION_UNBLOCKED, connection_unblocked, .dummy = 0);
  expect_event(p, MR_EV_UNBLOCKED);
  CHECK(!mr_engine_is_blocked(p->engine));
  CHECK(peer_publish(a, true, "b", NULL) >= 0);
  mr_engine_hold(p->engine, true); /* by this side: the broker's word is another one */
  CHECK(!mr_engine_is_blocked(p->engine));
  CHECK_EQ(peer_publish(a, true, "b", NULL), MR_BLOCKED);
  peer_send(p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = BYTES("low on disk"));
  expect_event(p, MR_EV_BLOCKED);
  mr_engine_hold(p->engine, false);
  CHECK_EQ(peer_publish(a, true, "b", NULL), MR_BLOCKED);
  peer_send(p, 0, CONNECTION_UNBLOCKED, connection_unblocked, .dummy = 0);
  expect_event(p, MR_EV_UNBLOCKED);
  CHECK(peer_publish(a, true, "b", NULL) >= 0);
  mr_route_free(route);
  mr_channel_release(a);
  peer_free(p);
}

/* ---- the end of a connection ---- */

static void we_close_the_connection(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p), *none = NULL;
  amqp_connection_close_t *sent;
  CHECK_EQ(mr_engine_close(p->engine, 200, "goodbye"), MR_OK);
  sent = expect(p, 0, CONNECTION_CLOSE, connection_close);
  CHECK_EQ(sent->reply_code, 200);
  CHECK_TEXT(sent->reply_text, "goodbye");
  CHECK(!mr_engine_is_open(p->engine));
  CHECK(!mr_channel_is_open(a));
  CHECK_EQ(mr_channel_open(p->engine, &none), MR_CLOSED);
  CHECK_EQ(call(a, QUEUE_PURGE, queue_purge, .queue = BYTES("q")), MR_CLOSED);
  CHECK_EQ(peer_publish(a, true, "b", NULL), MR_CLOSED);
  mr_engine_close(p->engine, 200, "again");
  expect_nothing(p);
  peer_send(p, 0, CONNECTION_CLOSE_OK, connection_close_ok, .dummy = 0);
  expect_closed(p, MR_KIND_CLOSED);
  expect_nothing(p);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  mr_engine_tick(p->engine, p->now + 1000);
  CHECK_EQ(mr_engine_close(p->engine, 200, "again"), MR_CLOSED);
  mr_channel_release(a);
  peer_free(p);
}

static void the_broker_closes_the_connection(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p);
  mr_error *error;
  size_t space;
  CHECK(peer_publish(a, true, "b", NULL) >= 0);
  peer_discard(p);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 320,
            .reply_text = BYTES(
                "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'"));
  error = expect_closed(p, MR_KIND_CLOSED);
  CHECK_EQ(error->code, 320);
  CHECK(strstr(error->text, "shutdown"));
  expect(p, 0, CONNECTION_CLOSE_OK, connection_close_ok);
  CHECK_EQ(mr_confirm_outcome(a, 1), MR_LOST);
  CHECK(mr_engine_rx_reserve(p->engine, &space) == NULL);
  CHECK_EQ(mr_engine_feed(p->engine, "x", 1, p->now), 0);
  mr_channel_release(a);
  peer_free(p);
}

static void a_close_for_our_fault_is_a_protocol_error(void) {
  peer *p = peer_open();
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 503,
            .reply_text = BYTES("COMMAND_INVALID"), .class_id = 60, .method_id = 40);
  CHECK_EQ(expect_closed(p, MR_KIND_PROTOCOL)->method_id, 40);
  peer_free(p);
}

static void connection_closes_that_cross(void) {
  peer *p = peer_open();
  CHECK_EQ(mr_engine_close(p->engine, 200, "bye"), MR_OK);
  expect(p, 0, CONNECTION_CLOSE, connection_close);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 320,
            .reply_text = BYTES("CONNECTION_FORCED"));
  expect_event(p, MR_EV_CLOSED);
  expect(p, 0, CONNECTION_CLOSE_OK, connection_close_ok);
  peer_free(p);
}

static void events_before_the_end_are_still_told(void) {
  peer *p = peer_open();
  mr_channel *a = peer_confirm_channel(p);
  mr_error *error;
  CHECK(peer_publish(a, true, "b", NULL) >= 0);
  peer_discard(p);
  peer_ack(p, 1, 1, false);
  peer_send(p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = BYTES("r"));
  peer_bytes(&p->to_client, "\x01\0\1\0\0", 5); /* and a part of a frame */
  CHECK_EQ(mr_engine_feed(p->engine, p->to_client.data, p->to_client.len, p->now),
           p->to_client.len);
  p->to_client.len = p->to_client.pos = 0;
  mr_engine_eof(p->engine, "connection reset by peer");
  expect_event(p, MR_EV_CONFIRM);
  expect_event(p, MR_EV_BLOCKED);
  error = expect_closed(p, MR_KIND_CLOSED);
  CHECK(strstr(error->text, "connection reset by peer"));
  mr_channel_release(a);
  peer_free(p);
}

static void texts_of_the_network_are_cut_and_clean(void) {
  static char text[255];
  peer *p = peer_open();
  mr_error *error;
  memset(text, '\n', sizeof text);
  memcpy(text, "\x1B[31m", 5);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 541,
            .reply_text = (amqp_bytes_t){.len = sizeof text, .bytes = text});
  expect_event(p, MR_EV_CLOSED);
  error = &p->event.error;
  for (const char *c = error->text; *c; c++) CHECK((unsigned char)*c >= ' ');
  peer_free(p);
}

static void closes_without_words_still_say_something(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p);
  peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 404, .reply_text = BYTES(""));
  CHECK(expect_event(p, MR_EV_CHANNEL_CLOSED)->error.text[0]);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 0, .reply_text = BYTES(""));
  CHECK(expect_event(p, MR_EV_CLOSED)->error.text[0]);
  mr_channel_release(a);
  peer_free(p);
}

/* ---- time ---- */

static peer *beating(uint16_t heartbeat) {
  mr_config config = peer_config();
  peer *p;
  config.heartbeat = heartbeat;
  p = peer_new(&config);
  peer_handshake(p, 2047, 131072, 60);
  peer_discard(p);
  return p;
}

/* Steps time as a driver would: to each deadline in turn, but no further than `until`. */
static int step(peer *p, double until) {
  int heartbeats = 0;
  for (int rounds = 0;; rounds++) {
    double due = mr_engine_deadline(p->engine, p->now);
    CHECK(rounds < 10000);
    if (due < 0 || due > until) break;
    if (due > p->now) p->now = due;
    mr_engine_tick(p->engine, p->now);
    while (peer_take(p, &p->frame)) {
      CHECK_EQ(p->frame.type, AMQP_FRAME_HEARTBEAT);
      heartbeats++;
    }
  }
  p->now = until;
  return heartbeats;
}

static void heartbeats_leave_at_half_the_interval(void) {
  peer *p = beating(10);
  double start = p->now;
  int n = 0;
  for (int i = 0; i < 20; i++) { /* the peer speaks every 5 s */
    n += step(p, p->now + 5);
    peer_heartbeat(p);
    expect_no_event(p);
  }
  CHECK(p->now == start + 100);
  CHECK(n >= 19 && n <= 21);
  peer_free(p);
}

static void a_busy_connection_sends_no_heartbeats(void) {
  peer *p = beating(10);
  mr_channel *a = peer_channel(p);
  int n = 0;
  for (int i = 0; i < 50; i++) {
    CHECK(peer_publish(a, false, "b", NULL) >= 0);
    peer_discard(p);
    n += step(p, p->now + 4);
    peer_heartbeat(p);
    expect_no_event(p);
  }
  CHECK_EQ(n, 0);
  mr_channel_release(a);
  peer_free(p);
}

static void silence_ends_the_connection_after_two_intervals(void) {
  peer *p = beating(10);
  double heard = p->now;
  mr_error *error;
  step(p, heard + 19.9);
  expect_no_event(p);
  CHECK(mr_engine_is_open(p->engine));
  step(p, heard + 20.1);
  error = expect_closed(p, MR_KIND_TIMEOUT);
  CHECK(error->text[0]);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  peer_free(p);
}

/* Any byte is a sign of life, not only a heartbeat. */
static void any_bytes_are_a_sign_of_life(void) {
  peer *p = beating(10);
  for (int i = 0; i < 20; i++) {
    step(p, p->now + 15);
    peer_bytes(&p->to_client, i % 8 ? (i % 8 == 7 ? "\xCE" : "\0") : "\x08",
               1); /* a heartbeat, a byte at a time */
    expect_no_event(p);
  }
  CHECK(mr_engine_is_open(p->engine));
  peer_free(p);
}

static void no_heartbeats_without_an_interval(void) {
  peer *p = beating(0);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  mr_engine_tick(p->engine, p->now + 1e6);
  expect_nothing(p);
  expect_no_event(p);
  CHECK(mr_engine_is_open(p->engine));
  peer_free(p);
}

static void early_ticks_do_nothing(void) {
  peer *p = beating(10);
  double due = mr_engine_deadline(p->engine, p->now), start = p->now;
  CHECK(due > start && due <= start + 5);
  for (int i = 0; i < 1000; i++) {
    mr_engine_tick(p->engine, start + (due - start) * i / 1001);
    expect_nothing(p);
  }
  CHECK(mr_engine_deadline(p->engine, p->now) == due);
  peer_free(p);
}

static void a_pause_is_not_the_peers_fault(void) {
  peer *p = beating(10);
  mr_engine_pause(p->engine, true, p->now);
  CHECK(step(p, p->now + 100) >= 19); /* ours still leave */
  expect_no_event(p);
  CHECK(mr_engine_is_open(p->engine));
  mr_engine_pause(p->engine, false, p->now);
  step(p, p->now + 19);
  CHECK(mr_engine_is_open(p->engine));
  step(p, p->now + 2);
  expect_closed(p, MR_KIND_TIMEOUT);
  peer_free(p);
}

/* The process stood still: what the peer sent meanwhile waits to be read. */
static void a_stall_of_our_own_is_forgiven_once(void) {
  peer *p = beating(10);
  step(p, p->now + 5);
  p->now += 300;
  mr_engine_tick(p->engine, p->now);
  expect_no_event(p);
  CHECK(mr_engine_is_open(p->engine));
  peer_discard(p);
  step(p, p->now + 20);
  expect_closed(p, MR_KIND_TIMEOUT);
  peer_free(p);
}

/* A driver whose every tick is late must not take that for a stall each time. */
static void silence_is_noticed_by_late_ticks(void) {
  peer *p = beating(1);
  for (int i = 1; i <= 5; i++) mr_engine_tick(p->engine, p->now + i);
  expect_closed(p, MR_KIND_TIMEOUT);
  peer_free(p);
}

static void each_silence_has_one_reprieve(void) {
  peer *p = beating(10);
  for (int i = 0; i < 5; i++) {
    p->now += 300;
    mr_engine_tick(p->engine, p->now);
    expect_no_event(p);
    CHECK(mr_engine_is_open(p->engine));
    if (i % 2) {
      mr_engine_pause(p->engine, true, p->now);
      mr_engine_pause(p->engine, false, p->now);
    } else {
      peer_heartbeat(p);
      expect_no_event(p);
    }
  }
  p->now += 300;
  mr_engine_tick(p->engine, p->now);
  CHECK(mr_engine_is_open(p->engine));
  p->now += 300;
  mr_engine_tick(p->engine, p->now);
  expect_closed(p, MR_KIND_TIMEOUT);
  peer_free(p);
}

static void a_silent_handshake_has_no_deadline_of_its_own(void) {
  mr_config config = peer_config();
  peer *p;
  config.heartbeat = 5;
  p = peer_new(&config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  mr_engine_tick(p->engine, p->now + 100);
  expect_no_event(p);
  peer_free(p);
}

static size_t room_to_receive(peer *p) {
  size_t space;
  CHECK(mr_engine_rx_reserve(p->engine, &space));
  return space;
}

static void an_idle_engine_gives_its_buffers_back(void) {
  peer *p = beating(10);
  mr_channel *a = peer_channel(p);
  static char body[500000];
  peer_consume(p, a, "c", 1, false);
  for (uint64_t tag = 1; tag <= 20; tag++) {
    peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = tag);
    peer_content(p, 1, NULL, body, sizeof body);
    expect_event(p, MR_EV_DELIVER);
    mr_settle(a, tag, MR_SETTLE_ACK, false);
  }
  expect_no_event(p);
  CHECK_EQ(mr_flush_acks(a), MR_OK);
  peer_discard(p);
  CHECK(room_to_receive(p) > 100000);
  for (int i = 0; i < 10; i++) {
    step(p, p->now + 4);
    peer_heartbeat(p); /* and works on */
    expect_no_event(p);
  }
  CHECK(room_to_receive(p) <= 16384);
  peer_deliver(p, 1, "c", 21, "still here");
  CHECK_TEXT(expect_event(p, MR_EV_DELIVER)->content.body, "still here");
  mr_channel_release(a);
  peer_free(p);
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(the_pieces_of_the_input_do_not_matter);
  RUN(the_handshake_in_pieces);
  RUN(bodies_of_every_size_arrive);
  RUN(room_grows_with_what_has_come);
  RUN(what_an_event_shows_is_freed_with_the_next);
  RUN(empty_body_frames_are_nothing);
  RUN(a_delivery_for_nobody_is_a_protocol_error);
  RUN(frames_out_of_place_are_a_protocol_error);
  RUN(malformed_frames_are_a_protocol_error);
  RUN(every_truncation_of_a_method_is_refused);
  RUN(a_message_over_max_message_size_is_refused);
  RUN(a_caller_that_stops_asking_stops_reading);
  RUN(answers_to_a_flood_are_bounded);
  RUN(numbers_are_used_again);
  RUN(a_channel_that_the_broker_closes_has_ended);
  RUN(further_closes_of_a_channel_are_passed_over);
  RUN(the_number_of_a_channel_that_the_broker_closed_rests);
  RUN(numbers_do_not_rest_for_ever);
  RUN(closes_that_cross);
  RUN(nothing_is_told_of_a_channel_whose_end_was_told);
  RUN(a_channel_refused_at_open);
  RUN(a_channel_can_be_used_before_open_ok);
  RUN(channel_max_is_obeyed);
  RUN(two_thousand_channels);
  RUN(a_released_channel_is_silent);
  RUN(a_closing_channel_takes_what_is_on_its_way);
  RUN(the_broker_cancels_a_consumer);
  RUN(a_tag_is_free_after_a_cancel);
  RUN(a_late_cancel_ok_leaves_the_successor_alone);
  RUN(the_brokers_flow_pauses_publishing);
  RUN(a_blocked_connection_pauses_publishing);
  RUN(we_close_the_connection);
  RUN(the_broker_closes_the_connection);
  RUN(a_close_for_our_fault_is_a_protocol_error);
  RUN(connection_closes_that_cross);
  RUN(events_before_the_end_are_still_told);
  RUN(texts_of_the_network_are_cut_and_clean);
  RUN(closes_without_words_still_say_something);
  RUN(heartbeats_leave_at_half_the_interval);
  RUN(a_busy_connection_sends_no_heartbeats);
  RUN(silence_ends_the_connection_after_two_intervals);
  RUN(any_bytes_are_a_sign_of_life);
  RUN(no_heartbeats_without_an_interval);
  RUN(early_ticks_do_nothing);
  RUN(a_pause_is_not_the_peers_fault);
  RUN(a_stall_of_our_own_is_forgiven_once);
  RUN(silence_is_noticed_by_late_ticks);
  RUN(each_silence_has_one_reprieve);
  RUN(a_silent_handshake_has_no_deadline_of_its_own);
  RUN(an_idle_engine_gives_its_buffers_back);
  return check_end();
}
