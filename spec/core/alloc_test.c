/*
 * A whole session in which the n-th allocation fails, for every n, once alone and once with all that
 * follow. Nothing may crash or leak, whoever allocates; and either somebody says that memory ran
 * out, or the session ends as if nothing had happened.
 */
#include "peer.h"
/* keep behind the headers above */
#include "malloc_hook.h"

/* What the broker says, prepared before anything can fail. */
typedef struct {
  size_t from, to;
} piece;

static peer script;
static piece hello, tune, open_ok, answers, messages, settled, bye;
static uint8_t raw_props[] = "\xB0\0\1t\0\0\0\x16\x0Emoonrabbit-seqx\0\0\0\2hi\2";
static uint8_t body[9000];

static piece cut(void) {
  static size_t last;
  piece p = {last, script.to_client.len};
  last = p.to;
  return p;
}

static void write_script(void) {
  amqp_table_entry_t capability = {
      .key = BYTES("authentication_failure_close"),
      .value = {.kind = AMQP_FIELD_KIND_BOOLEAN, .value = {.boolean = 1}}};
  amqp_table_entry_t properties[2] = {
      {.key = BYTES("product"),
       .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("script")}}},
      {.key = BYTES("capabilities"), .value = {.kind = AMQP_FIELD_KIND_TABLE}}};
  amqp_table_entry_t seq = {.key = BYTES(MR_SEQ_HEADER),
                            .value = {.kind = AMQP_FIELD_KIND_I64, .value = {.i64 = 2}}};
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG,
                                   .headers = {.num_entries = 1, .entries = &seq}};
  peer *p = &script;
  properties[1].value.value.table = (amqp_table_t){.num_entries = 1, .entries = &capability};
  p->frame_max = 4096;
  peer_send(p, 0, CONNECTION_START, connection_start, .version_minor = 9,
            .server_properties = {.num_entries = 2, .entries = properties},
            .mechanisms = BYTES("PLAIN"), .locales = BYTES("en_US"));
  hello = cut();
  peer_tune(p, 100, 4096, 10);
  tune = cut();
  peer_send(p, 0, CONNECTION_OPEN_OK, connection_open_ok, .known_hosts = BYTES(""));
  open_ok = cut();
  peer_send(p, 1, CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES(""));
  peer_send(p, 1, CONFIRM_SELECT_OK, confirm_select_ok, .dummy = 0);
  peer_send(p, 1, QUEUE_DECLARE_OK, queue_declare_ok, .queue = BYTES("queue"));
  peer_send(p, 1, BASIC_CONSUME_OK, basic_consume_ok, .consumer_tag = BYTES("c"));
  peer_send(p, 2, CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES(""));
  answers = cut();
  for (uint64_t tag = 1; tag <= 20; tag++) {
    peer_send(p, 1, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = tag,
              .exchange = BYTES("x"), .routing_key = BYTES("k"));
    peer_content(p, 1, &props, body, tag % 5 ? 10 : sizeof body);
  }
  peer_send(p, 1, BASIC_GET_OK, basic_get_ok, .delivery_tag = 21);
  peer_content(p, 1, NULL, body, 5000);
  peer_send(p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = BYTES("why"));
  peer_send(p, 0, CONNECTION_UNBLOCKED, connection_unblocked, .dummy = 0);
  peer_send(p, 2, CHANNEL_FLOW, channel_flow, .active = 1);
  peer_send(p, 2, CHANNEL_CLOSE, channel_close, .reply_code = 404,
            .reply_text = BYTES("NOT_FOUND"));
  messages = cut();
  peer_send(p, 1, BASIC_RETURN, basic_return, .reply_code = 312, .reply_text = BYTES("NO_ROUTE"));
  peer_content(p, 1, &props, body, 10);
  peer_ack(p, 1, 150, true);
  peer_method(p, 0, MR_CONNECTION_UPDATE_SECRET_OK, NULL);
  peer_send(p, 1, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"), .nowait = 0);
  settled = cut();
  peer_send(p, 0, CONNECTION_CLOSE_OK, connection_close_ok, .dummy = 0);
  bye = cut();
}

typedef struct {
  mr_engine *engine;
  bool said; /* somebody said that memory ran out */
  bool closed;
  mr_kind kind;
  int events[MR_EV_CLOSED + 1];
  uint64_t confirmed, bytes;
  int unroutable;
} session;

static void told(session *s, mr_status status) {
  if (status == MR_NO_MEMORY) s->said = true;
}

static void pump(session *s) {
  mr_event ev;
  while (mr_engine_next(s->engine, &ev) != MR_EV_NONE) {
    s->events[ev.type]++;
    if (ev.type == MR_EV_DELIVER || ev.type == MR_EV_GET_OK) s->bytes += ev.content.body.len;
    if (ev.type == MR_EV_CONFIRM) s->confirmed += ev.confirm.last - ev.confirm.first + 1;
    if (ev.type == MR_EV_CONFIRM && ev.confirm.outcome == MR_UNROUTABLE) s->unroutable++;
    if (ev.type != MR_EV_CLOSED) continue;
    s->closed = true;
    s->kind = ev.error.kind;
    if (ev.error.kind == MR_KIND_MEMORY) s->said = true;
    if (!ev.error.text[0]) abort();
  }
}

static void hear(session *s, piece what) {
  size_t at = what.from;
  while (at < what.to && !s->closed) {
    size_t most = what.to - at < 3000 ? what.to - at : 3000;
    size_t n = mr_engine_feed(s->engine, script.to_client.data + at, most, 1);
    at += n;
    pump(s);
    if (n == 0 && !s->closed) {
      /* once more: there may be room now */
      n = mr_engine_feed(s->engine, script.to_client.data + at, most, 1);
      at += n;
      pump(s);
      if (n == 0) break;
    }
  }
}

static void say(session *s) {
  size_t n;
  while (mr_engine_tx_peek(s->engine, &n)) mr_engine_tx_consume(s->engine, n, 1);
}

static void use_channel(session *s, mr_channel *ch) {
  amqp_table_entry_t entry = {.key = BYTES("x-max-length"),
                              .value = {.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = 9}}};
  amqp_basic_consume_t consume = {.queue = BYTES("queue"), .consumer_tag = BYTES("c")};
  mr_publish_args args = {.routing_key = BYTES("queue"),
                          .mandatory = true,
                          .props = {.len = sizeof raw_props - 1, .bytes = raw_props},
                          .body = {.len = 5000, .bytes = body}};
  mr_channel *other = NULL;
  mr_route *route = NULL;
  mr_status status;
  told(s, call(ch, CONFIRM_SELECT, confirm_select, .nowait = 0));
  told(s, call(ch, QUEUE_DECLARE, queue_declare, .queue = BYTES("queue"),
               .arguments = {.num_entries = 1, .entries = &entry}));
  told(s, mr_consume(ch, &consume, 1));
  told(s, mr_channel_open(s->engine, &other));
  say(s);
  hear(s, answers);
  told(s, mr_get(ch, BYTES("queue"), false));
  hear(s, messages);
  say(s);
  for (uint64_t tag = 1; tag <= 9; tag += 2) told(s, mr_settle(ch, tag, MR_SETTLE_ACK, false));
  told(s, mr_settle(ch, 2, MR_SETTLE_NACK, true));
  told(s, mr_settle(ch, 4, MR_SETTLE_REJECT, true));
  told(s, mr_flush_acks(ch));
  told(s, mr_settle_upto(ch, 15, MR_SETTLE_NACK, false));
  told(s, mr_settle_upto(ch, 0, MR_SETTLE_ACK, false));
  mr_engine_tick(s->engine, 2);
  status = mr_route_new(&args, &route);
  told(s, status);
  if (status == MR_OK) {
    for (int i = 0; i < 75; i++) told(s, mr_publish_route(ch, route, args.body, NULL));
  }
  for (int i = 0; i < 75; i++) {
    told(s, mr_publish(ch, &args, NULL));
    if (i % 25 == 0) say(s);
  }
  mr_route_free(route);
  told(s, mr_engine_update_secret(s->engine, BYTES("new"), BYTES("why")));
  say(s);
  hear(s, settled);
  mr_channel_release(other);
}

static void use_props(session *s) {
  amqp_table_entry_t entry = {.key = BYTES("new"),
                              .value = {.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = 9}}};
  amqp_table_t set = {.num_entries = 1, .entries = &entry};
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG, .headers = set},
                          *decoded = NULL;
  amqp_bytes_t raw = {.len = sizeof raw_props - 1, .bytes = raw_props}, name = BYTES(MR_SEQ_HEADER);
  amqp_pool_t pool;
  uint8_t *out = NULL;
  size_t n;
  told(s, mr_props_encode(&props, &out, &n));
  free(out);
  out = NULL;
  told(s, mr_props_edit(raw, &name, 1, &set, &out, &n));
  free(out);
  init_amqp_pool(&pool, 4096);
  told(s, mr_props_decode(raw, &pool, &decoded));
  empty_amqp_pool(&pool);
}

/* The whole session; counts on being called with the hook on. */
static void run(session *s) {
  amqp_table_entry_t name = {
      .key = BYTES("connection_name"),
      .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("me")}}};
  mr_config config = peer_config();
  mr_error err = {.kind = 0};
  mr_channel *ch = NULL;
  memset(s, 0, sizeof *s);
  config.heartbeat = 10;
  config.client_properties = (amqp_table_t){.num_entries = 1, .entries = &name};
  use_props(s);
  s->engine = mr_engine_new(&config, &err);
  if (!s->engine) {
    s->said = err.kind == MR_KIND_MEMORY && err.text[0];
    return;
  }
  told(s, mr_engine_start(s->engine, 1));
  say(s);
  hear(s, hello);
  say(s);
  hear(s, tune);
  say(s);
  hear(s, open_ok);
  told(s, mr_channel_open(s->engine, &ch));
  if (ch) use_channel(s, ch);
  told(s, mr_engine_close(s->engine, 200, "bye"));
  say(s);
  hear(s, bye);
  mr_channel_release(ch);
  mr_engine_free(s->engine);
}

static void expect_complete(const session *s) {
  CHECK(s->closed);
  CHECK_EQ(s->kind, MR_KIND_CLOSED);
  CHECK_EQ(s->events[MR_EV_OPEN], 1);
  CHECK_EQ(s->events[MR_EV_REPLY], 6);
  CHECK_EQ(s->events[MR_EV_DELIVER], 20);
  CHECK_EQ(s->events[MR_EV_GET_OK], 1);
  CHECK_EQ(s->events[MR_EV_RETURN], 1);
  CHECK_EQ(s->events[MR_EV_CHANNEL_CLOSED], 1);
  CHECK_EQ(s->events[MR_EV_CONSUMER_CANCEL], 1);
  CHECK_EQ(s->events[MR_EV_FLOW], 1);
  CHECK_EQ(s->bytes, 16 * 10 + 4 * sizeof body + 5000);
  CHECK_EQ(s->confirmed, 150);
  CHECK_EQ(s->unroutable, 1);
}

static long sessions_with_failures(bool rest) {
  session s;
  long n;
  for (n = 1;; n++) {
    hook.calls = hook.failed = hook.failed_below = hook.live = 0;
    hook.fail_at = n;
    hook.fail_rest = rest;
    hook.on = true;
    run(&s);
    hook.on = false;
    /* librabbitmq's amqp_pool_alloc itself forgets the block that it could not note down */
    if (hook.live > hook.failed_below) FAIL("allocation %ld failed: %ld blocks leak", n, hook.live);
    if (hook.failed == 0) break;
    if (!s.said) {
      if (rest) FAIL("allocation %ld and the later ones failed, and nobody said so", n);
      expect_complete(&s); /* what could not be had was not needed */
    }
  }
  expect_complete(&s);
  return n - 1;
}

static void a_session_without_failures_is_complete(void) {
  session s;
  run(&s);
  CHECK(!s.said);
  expect_complete(&s);
}

static void one_failing_allocation_is_survived(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  CHECK(sessions_with_failures(false) > 40);
}

static void memory_that_ends_is_survived(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  CHECK(sessions_with_failures(true) > 40);
}

static peer *roomy(uint16_t heartbeat) {
  mr_config config = peer_config();
  config.heartbeat = heartbeat;
  config.max_buffer = 4 << 20;
  peer *p = peer_new(&config);
  peer_handshake(p, 2047, 131072, 60);
  return p;
}

/* Allocations that it takes to publish a megabyte, which then leaves. */
static long allocations_of_a_burst(peer *p, mr_channel *ch) {
  mr_publish_args args = {
      .exchange = BYTES("x"), .routing_key = BYTES("k"), .body = {sizeof body, body}};
  hook.calls = hook.fail_at = 0;
  hook.on = true;
  for (size_t sent = 0; sent < 1000000; sent += sizeof body) {
    mr_status status = mr_publish(ch, &args, NULL);
    if (status != MR_OK && status != MR_FLUSH) FAIL("status %d", status);
  }
  hook.on = false;
  peer_discard(p);
  return hook.calls;
}

static void output_keeps_its_room_until_it_is_idle(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = roomy(10);
  mr_channel *ch = peer_channel(p);
  CHECK(allocations_of_a_burst(p, ch) > 0);
  CHECK_EQ(allocations_of_a_burst(p, ch), 0);
  p->now = mr_engine_deadline(p->engine, p->now); /* nothing was sent: a heartbeat */
  mr_engine_tick(p->engine, p->now);
  peer_discard(p);
  CHECK(allocations_of_a_burst(p, ch) > 0);
  mr_channel_release(ch);
  peer_free(p);
}

static void output_without_heartbeats_keeps_little_room(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = roomy(0);
  mr_channel *ch = peer_channel(p);
  CHECK(allocations_of_a_burst(p, ch) > 0);
  CHECK(allocations_of_a_burst(p, ch) > 0);
  mr_channel_release(ch);
  peer_free(p);
}

/* The same for LeakSanitizer. */
const char *__lsan_default_suppressions(void);
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void) {
  return "leak:amqp_pool_alloc\n";
}

const char *__lsan_default_options(void);
__attribute__((visibility("default"))) const char *__lsan_default_options(void) {
  return "print_suppressions=0";
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  write_script();
  RUN(a_session_without_failures_is_complete);
  RUN(one_failing_allocation_is_survived);
  RUN(memory_that_ends_is_survived);
  RUN(output_keeps_its_room_until_it_is_idle);
  RUN(output_without_heartbeats_keeps_little_room);
  free(script.to_client.data);
  return check_end();
}
