/* Every method of a client: what is written, and which reply is waited for. */
#include "peer.h"

/* One method, its answer, and a value of each of its fields. */
typedef struct {
  amqp_method_number_t method, reply;
  void *arguments, *answer;
} exchange_of_methods;

static amqp_table_entry_t ENTRY[1];
#define ARGUMENTS ((amqp_table_t){.num_entries = 1, .entries = ENTRY})
#define M(NAME, name, REPLY, reply_name, ...)                                   \
  {                                                                             \
    AMQP_##NAME##_METHOD, AMQP_##REPLY##_METHOD, &(amqp_##name##_t)__VA_ARGS__, \
        &(amqp_##reply_name##_t) {                                              \
      0                                                                         \
    }                                                                           \
  }

static size_t encoded(amqp_method_number_t method, void *decoded, uint8_t *to) {
  int n = amqp_encode_method(method, decoded, (amqp_bytes_t){.len = 4096, .bytes = to});
  if (n < 0) FAIL("cannot encode method %08x", (unsigned)method);
  return (size_t)n;
}

static void one(peer *p, mr_channel *channel, const exchange_of_methods *m) {
  uint8_t want[4096];
  size_t n = encoded(m->method, m->arguments, want);
  mr_status status = mr_call(channel, m->method, m->arguments);
  mr_event *ev;
  if (status < 0) FAIL("method %08x: %s", (unsigned)m->method, mr_status_text(status));
  peer_expect(p, mr_channel_id(channel), m->method, __FILE__, __LINE__);
  CHECK_BYTES((uint8_t *)p->frame.payload.bytes + 4, p->frame.payload.len - 4, want, n);
  expect_nothing(p);
  expect_no_event(p);
  if (!m->reply) return;
  peer_method(p, mr_channel_id(channel), m->reply, m->answer);
  ev = expect_event(p, MR_EV_REPLY);
  CHECK_EQ(ev->method.id, m->reply);
  CHECK(ev->channel == channel);
  CHECK_BYTES(want, encoded(m->reply, ev->method.decoded, want), want,
              encoded(m->reply, m->answer, want));
  expect_no_event(p);
}

static void every_method_is_written_and_answered(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  ENTRY[0] = (amqp_table_entry_t){.key = BYTES("a"),
                                  .value = {.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = -7}}};
  exchange_of_methods all[] = {
      M(EXCHANGE_DECLARE, exchange_declare, EXCHANGE_DECLARE_OK, exchange_declare_ok,
        {.exchange = BYTES("x"), .type = BYTES("topic"), .durable = 1, .arguments = ARGUMENTS}),
      M(EXCHANGE_DECLARE, exchange_declare, EXCHANGE_DECLARE_OK, exchange_declare_ok,
        {.exchange = BYTES("x"), .passive = 1, .auto_delete = 1, .internal = 1}),
      M(EXCHANGE_DELETE, exchange_delete, EXCHANGE_DELETE_OK, exchange_delete_ok,
        {.exchange = BYTES("x"), .if_unused = 1}),
      M(EXCHANGE_BIND, exchange_bind, EXCHANGE_BIND_OK, exchange_bind_ok,
        {.destination = BYTES("y"),
         .source = BYTES("x"),
         .routing_key = BYTES("#"),
         .arguments = ARGUMENTS}),
      M(EXCHANGE_UNBIND, exchange_unbind, EXCHANGE_UNBIND_OK, exchange_unbind_ok,
        {.destination = BYTES("y"),
         .source = BYTES("x"),
         .routing_key = BYTES("#"),
         .arguments = ARGUMENTS}),
      {AMQP_QUEUE_DECLARE_METHOD, AMQP_QUEUE_DECLARE_OK_METHOD,
       &(amqp_queue_declare_t){
           .queue = BYTES("q"), .durable = 1, .exclusive = 1, .arguments = ARGUMENTS},
       &(amqp_queue_declare_ok_t){
           .queue = BYTES("amq.gen-1"), .message_count = 4000000000u, .consumer_count = 3}},
      M(QUEUE_BIND, queue_bind, QUEUE_BIND_OK, queue_bind_ok,
        {.queue = BYTES("q"),
         .exchange = BYTES("x"),
         .routing_key = BYTES("k"),
         .arguments = ARGUMENTS}),
      M(QUEUE_UNBIND, queue_unbind, QUEUE_UNBIND_OK, queue_unbind_ok,
        {.queue = BYTES("q"),
         .exchange = BYTES("x"),
         .routing_key = BYTES("k"),
         .arguments = ARGUMENTS}),
      {AMQP_QUEUE_PURGE_METHOD, AMQP_QUEUE_PURGE_OK_METHOD,
       &(amqp_queue_purge_t){.queue = BYTES("q")}, &(amqp_queue_purge_ok_t){.message_count = 9}},
      {AMQP_QUEUE_DELETE_METHOD, AMQP_QUEUE_DELETE_OK_METHOD,
       &(amqp_queue_delete_t){.queue = BYTES("q"), .if_unused = 1, .if_empty = 1},
       &(amqp_queue_delete_ok_t){.message_count = 10}},
      M(BASIC_QOS, basic_qos, BASIC_QOS_OK, basic_qos_ok, {.prefetch_count = 300, .global = 1}),
      M(BASIC_RECOVER, basic_recover, BASIC_RECOVER_OK, basic_recover_ok, {.requeue = 1}),
      {AMQP_BASIC_RECOVER_ASYNC_METHOD, 0, &(amqp_basic_recover_async_t){.requeue = 1}, NULL},
      M(CHANNEL_FLOW, channel_flow, CHANNEL_FLOW_OK, channel_flow_ok, {.active = 1}),
      M(CONFIRM_SELECT, confirm_select, CONFIRM_SELECT_OK, confirm_select_ok, {.nowait = 0}),
  };
  exchange_of_methods tx[] = {
      M(TX_SELECT, tx_select, TX_SELECT_OK, tx_select_ok, {0}),
      M(TX_COMMIT, tx_commit, TX_COMMIT_OK, tx_commit_ok, {0}),
      M(TX_ROLLBACK, tx_rollback, TX_ROLLBACK_OK, tx_rollback_ok, {0}),
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) one(p, channel, &all[i]);
  mr_channel_release(channel);
  channel = peer_channel((peer_discard(p), p));
  for (size_t i = 0; i < sizeof tx / sizeof *tx; i++) one(p, channel, &tx[i]);
  mr_channel_release(channel);
  peer_free(p);
}

static void consume_and_cancel(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  amqp_basic_consume_t consume = {
      .queue = BYTES("q"), .consumer_tag = BYTES("me"), .no_ack = 1, .exclusive = 1};
  amqp_basic_consume_t *sent;
  amqp_basic_consume_ok_t *ok;
  CHECK_EQ(mr_consume(channel, &consume, 77), MR_OK);
  sent = expect(p, 1, BASIC_CONSUME, basic_consume);
  CHECK_TEXT(sent->queue, "q");
  CHECK_TEXT(sent->consumer_tag, "me");
  CHECK(sent->no_ack && sent->exclusive && !sent->nowait && !sent->no_local);
  peer_send(p, 1, BASIC_CONSUME_OK, basic_consume_ok, .consumer_tag = BYTES("me"));
  ok = expect_reply(p, channel, BASIC_CONSUME_OK);
  CHECK_TEXT(ok->consumer_tag, "me");
  CHECK_EQ(call(channel, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("me")), MR_OK);
  CHECK_TEXT(expect(p, 1, BASIC_CANCEL, basic_cancel)->consumer_tag, "me");
  peer_deliver(p, 1, "me", 1, "on its way"); /* sent before the broker saw the cancel */
  peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("me"));
  CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, 77);
  expect_reply(p, channel, BASIC_CANCEL_OK);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_consumer_needs_its_tag_and_a_ref(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  amqp_basic_consume_t consume = {.queue = BYTES("q")};
  CHECK_EQ(mr_consume(channel, &consume, 1), MR_BAD_ARGUMENT);
  expect_nothing(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void get_answers_with_content_or_empty(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  amqp_basic_get_t *sent;
  mr_event *ev;
  CHECK_EQ(mr_get(channel, BYTES("q"), false), MR_OK);
  CHECK_EQ(mr_get(channel, BYTES("r"), true), MR_OK);
  CHECK_EQ(mr_get(channel, BYTES("s"), false), MR_OK);
  sent = expect(p, 1, BASIC_GET, basic_get);
  CHECK_TEXT(sent->queue, "q");
  CHECK(!sent->no_ack);
  CHECK(expect(p, 1, BASIC_GET, basic_get)->no_ack);
  expect(p, 1, BASIC_GET, basic_get);
  peer_send(p, 1, BASIC_GET_OK, basic_get_ok, .delivery_tag = 1, .redelivered = 1,
            .exchange = BYTES("x"), .routing_key = BYTES("rk"), .message_count = 5);
  peer_content(p, 1, NULL, "one", 3);
  peer_send(p, 1, BASIC_GET_OK, basic_get_ok, .delivery_tag = 2, .exchange = BYTES("x"),
            .routing_key = BYTES("rk"));
  peer_content(p, 1, NULL, "", 0);
  peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES(""));
  ev = expect_event(p, MR_EV_GET_OK);
  CHECK(ev->channel == channel);
  CHECK_EQ(ev->content.delivery_tag, 1);
  CHECK(ev->content.redelivered && !ev->content.no_ack);
  CHECK_EQ(ev->content.message_count, 5);
  CHECK_EQ(ev->content.consumer_ref, 0);
  CHECK_TEXT(ev->content.exchange, "x");
  CHECK_TEXT(ev->content.routing_key, "rk");
  CHECK_TEXT(ev->content.body, "one");
  CHECK_EQ(mr_unsettled(channel), 1);
  ev = expect_event(p, MR_EV_GET_OK);
  CHECK(ev->content.no_ack);
  CHECK_EQ(ev->content.body.len, 0);
  CHECK_EQ(mr_unsettled(channel), 1);
  expect_reply(p, channel, BASIC_GET_EMPTY);
  expect_no_event(p);
  CHECK(mr_settle(channel, 2, MR_SETTLE_ACK, false) < 0);
  CHECK(mr_settle(channel, 1, MR_SETTLE_ACK, false) >= 0);
  mr_channel_release(channel);
  peer_free(p);
}

static void nowait_expects_no_reply(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  amqp_basic_consume_t consume = {.queue = BYTES("q"), .consumer_tag = BYTES("t"), .nowait = 1};
  CHECK_EQ(call(channel, EXCHANGE_DECLARE, exchange_declare, .exchange = BYTES("x"),
                .type = BYTES("fanout"), .nowait = 1),
           MR_OK);
  CHECK_EQ(call(channel, EXCHANGE_DELETE, exchange_delete, .exchange = BYTES("x"), .nowait = 1),
           MR_OK);
  CHECK_EQ(call(channel, EXCHANGE_BIND, exchange_bind, .destination = BYTES("x"), .nowait = 1),
           MR_OK);
  CHECK_EQ(call(channel, EXCHANGE_UNBIND, exchange_unbind, .destination = BYTES("x"), .nowait = 1),
           MR_OK);
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("x"), .nowait = 1), MR_OK);
  CHECK_EQ(call(channel, QUEUE_BIND, queue_bind, .queue = BYTES("x"), .nowait = 1), MR_OK);
  CHECK_EQ(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("x"), .nowait = 1), MR_OK);
  CHECK_EQ(call(channel, QUEUE_DELETE, queue_delete, .queue = BYTES("x"), .nowait = 1), MR_OK);
  CHECK_EQ(mr_consume(channel, &consume, 5), MR_OK);
  CHECK_EQ(call(channel, CONFIRM_SELECT, confirm_select, .nowait = 1), MR_OK);
  CHECK(mr_channel_is_confirm(channel));
  CHECK_EQ(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("x")), MR_OK);
  peer_discard(p);
  peer_deliver(p, 1, "t", 1, "hello");
  CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, 5);
  peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = 1);
  expect_reply(p, channel, QUEUE_PURGE_OK);
  CHECK_EQ(call(channel, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("t"), .nowait = 1),
           MR_OK);
  peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = 1); /* nobody asked */
  expect_closed(p, MR_KIND_PROTOCOL);
  mr_channel_release(channel);
  peer_free(p);
}

/* RabbitMQ's queue process sends consume-ok itself. */
static void a_consume_ok_may_pass_its_neighbours(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  amqp_basic_consume_t consume = {.queue = BYTES("q"), .consumer_tag = BYTES("me")};
  for (int late = 0; late < 2; late++) {
    CHECK_EQ(mr_get(channel, BYTES("q"), false), MR_OK);
    CHECK_EQ(mr_consume(channel, &consume, 1), MR_OK);
    CHECK_EQ(mr_get(channel, BYTES("q"), false), MR_OK);
    if (late) peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES(""));
    if (late) peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES(""));
    peer_send(p, 1, BASIC_CONSUME_OK, basic_consume_ok, .consumer_tag = consume.consumer_tag);
    if (!late) peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES(""));
    if (!late) peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES(""));
    if (!late) expect_reply(p, channel, BASIC_CONSUME_OK);
    expect_reply(p, channel, BASIC_GET_EMPTY);
    expect_reply(p, channel, BASIC_GET_EMPTY);
    if (late) expect_reply(p, channel, BASIC_CONSUME_OK);
    consume.consumer_tag = (amqp_bytes_t)BYTES("you");
  }
  mr_channel_release(channel);
  peer_free(p);
}

/* So it does with cancel-ok, which comes behind the answers to its neighbours. */
static void a_cancel_ok_may_pass_its_neighbours(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  for (int nowait = 0; nowait < 2; nowait++) {
    peer_consume(p, channel, "me", 1, false);
    CHECK(call(channel, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("me"),
               .nowait = (amqp_boolean_t)nowait) >= 0);
    CHECK(call(channel, BASIC_QOS, basic_qos, .prefetch_count = 5) >= 0);
    CHECK(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("q")) >= 0);
    peer_discard(p);
    peer_send(p, 1, BASIC_QOS_OK, basic_qos_ok, .dummy = 0);
    expect_reply(p, channel, BASIC_QOS_OK);
    peer_deliver(p, 1, "me", (uint64_t)nowait + 1, "on its way");
    CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.consumer_ref, 1);
    peer_send(p, 1, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("me"));
    if (!nowait) expect_reply(p, channel, BASIC_CANCEL_OK);
    peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = 1);
    expect_reply(p, channel, QUEUE_PURGE_OK);
    expect_no_event(p);
  }
  mr_channel_release(channel);
  peer_free(p);
}

/* A channel.close makes the broker forget the cancel-ok. */
static void a_close_may_swallow_a_cancel_ok(void) {
  peer *p = peer_open();
  for (int nowait = 0; nowait < 2; nowait++) {
    mr_channel *channel = peer_channel(p);
    CHECK_EQ(mr_channel_id(channel), 1);
    peer_consume(p, channel, "me", 1, false);
    CHECK(call(channel, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("me"),
               .nowait = (amqp_boolean_t)nowait) >= 0);
    CHECK(mr_channel_close(channel, 200, "bye") >= 0);
    peer_discard(p);
    peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
    expect_reply(p, channel, CHANNEL_CLOSE_OK);
    expect_no_event(p);
    CHECK(mr_engine_is_open(p->engine));
    mr_channel_release(channel);
  }
  peer_free(p);
}

static void pipelined_calls_are_answered_in_order(void) {
  peer *p = peer_open();
  mr_channel *a = peer_channel(p), *b = peer_channel(p);
  for (int i = 0; i < 1000; i++) {
    mr_channel *channel = i % 3 ? a : b;
    if (i % 2)
      CHECK_EQ(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("q")), MR_OK);
    else
      CHECK_EQ(call(channel, QUEUE_BIND, queue_bind, .queue = BYTES("q")), MR_OK);
  }
  for (int i = 0; i < 1000; i++) {
    uint16_t id = mr_channel_id(i % 3 ? a : b);
    peer_expect(p, id, i % 2 ? AMQP_QUEUE_PURGE_METHOD : AMQP_QUEUE_BIND_METHOD, __FILE__,
                __LINE__);
    if (i % 2)
      peer_send(p, id, QUEUE_PURGE_OK, queue_purge_ok, .message_count = (uint32_t)i);
    else
      peer_send(p, id, QUEUE_BIND_OK, queue_bind_ok, .dummy = 0);
  }
  for (int i = 0; i < 1000; i++) {
    mr_event *ev = expect_event(p, MR_EV_REPLY);
    CHECK(ev->channel == (i % 3 ? a : b));
    CHECK_EQ(ev->method.id, i % 2 ? AMQP_QUEUE_PURGE_OK_METHOD : AMQP_QUEUE_BIND_OK_METHOD);
    if (i % 2) CHECK_EQ(((amqp_queue_purge_ok_t *)ev->method.decoded)->message_count, i);
  }
  expect_no_event(p);
  mr_channel_release(a);
  mr_channel_release(b);
  peer_free(p);
}

/* The queue of expected answers runs on for ever without growing. */
static void calls_overlap_for_long(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  uint32_t sent = 0, answered = 0;
  while (answered < 5000) {
    for (uint32_t n = check_below(7); n; n--, sent++)
      CHECK_EQ(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("q")), MR_OK);
    peer_discard(p);
    while (answered < sent && check_below(6)) {
      peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = answered);
      CHECK_EQ(((amqp_queue_purge_ok_t *)expect_reply(p, channel, QUEUE_PURGE_OK))->message_count,
               answered);
      answered++;
    }
  }
  mr_channel_release(channel);
  peer_free(p);
}

static void a_wrong_reply_is_a_protocol_error(void) {
  for (int wrong = 0; wrong < 6; wrong++) {
    peer *p = peer_open();
    mr_channel *channel = peer_channel(p);
    mr_error *error;
    CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q")), MR_OK);
    CHECK_EQ(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("q")), MR_OK);
    peer_discard(p);
    switch (wrong) {
      case 0: peer_send(p, 1, QUEUE_PURGE_OK, queue_purge_ok, .message_count = 0); break;
      case 1: peer_send(p, 1, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES("")); break;
      case 2: peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0); break;
      case 3: peer_send(p, 1, CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES("")); break;
      case 4: peer_send(p, 0, QUEUE_DECLARE_OK, queue_declare_ok, .queue = BYTES("q")); break;
      case 5:
        peer_send(p, 1, BASIC_GET_OK, basic_get_ok, .delivery_tag = 1);
        peer_content(p, 1, NULL, "x", 1);
        break;
    }
    error = expect_closed(p, MR_KIND_PROTOCOL);
    CHECK_EQ(error->code >= 500 && error->code < 600, 1);
    CHECK(expect(p, 0, CONNECTION_CLOSE, connection_close)->reply_code >= 500);
    CHECK(!mr_channel_is_open(channel));
    mr_channel_release(channel);
    peer_free(p);
  }
}

/* What only a broker's peer may say, or nobody. */
static void methods_of_a_client_are_a_protocol_error(void) {
  static const amqp_method_number_t methods[] = {
      AMQP_BASIC_PUBLISH_METHOD, AMQP_QUEUE_DECLARE_METHOD, AMQP_TX_SELECT_METHOD,
      AMQP_CHANNEL_OPEN_METHOD,  AMQP_BASIC_CONSUME_METHOD, AMQP_BASIC_GET_METHOD};
  for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
    union {
      amqp_queue_declare_t declare;
      amqp_basic_consume_t consume;
      uint8_t zero[256];
    } arguments;
    peer *p = peer_open();
    mr_channel *channel = peer_channel(p);
    memset(&arguments, 0, sizeof arguments);
    peer_method(p, 1, methods[i], &arguments);
    expect_closed(p, MR_KIND_PROTOCOL);
    mr_channel_release(channel);
    peer_free(p);
  }
  static const uint8_t unknown[] = {0, 60, 0, 99, 1, 2, 3};
  peer *p = peer_open();
  peer_frame_of(p, AMQP_FRAME_METHOD, 0, unknown, sizeof unknown);
  expect_closed(p, MR_KIND_PROTOCOL);
  peer_free(p);
}

static void bad_arguments_are_refused_before_a_byte_is_sent(void) {
  static char text[400];
  amqp_table_entry_t nest[MR_MAX_NESTING + 2];
  amqp_table_t table;
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  amqp_bytes_t longer = {.len = 256, .bytes = text};
  amqp_basic_consume_t consume = {.queue = longer, .consumer_tag = BYTES("t")};
  memset(text, 'n', sizeof text);
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, EXCHANGE_DECLARE, exchange_declare, .exchange = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, EXCHANGE_DECLARE, exchange_declare, .type = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, EXCHANGE_DELETE, exchange_delete, .exchange = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, EXCHANGE_BIND, exchange_bind, .destination = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, EXCHANGE_BIND, exchange_bind, .source = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, EXCHANGE_UNBIND, exchange_unbind, .routing_key = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, QUEUE_BIND, queue_bind, .exchange = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, QUEUE_UNBIND, queue_unbind, .routing_key = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, QUEUE_PURGE, queue_purge, .queue = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, QUEUE_DELETE, queue_delete, .queue = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, BASIC_CANCEL, basic_cancel, .consumer_tag = longer), MR_BAD_ARGUMENT);
  CHECK_EQ(mr_consume(channel, &consume, 1), MR_BAD_ARGUMENT);
  consume = (amqp_basic_consume_t){.queue = BYTES("q"), .consumer_tag = longer};
  CHECK_EQ(mr_consume(channel, &consume, 1), MR_BAD_ARGUMENT);
  CHECK_EQ(mr_get(channel, longer, false), MR_BAD_ARGUMENT);
  CHECK_EQ(mr_publish(channel, &(mr_publish_args){.routing_key = longer}, NULL), MR_BAD_ARGUMENT);
  CHECK_EQ(mr_publish(channel, &(mr_publish_args){.exchange = longer}, NULL), MR_BAD_ARGUMENT);
  mr_route *route = NULL;
  CHECK_EQ(mr_route_new(&(mr_publish_args){.exchange = longer}, &route), MR_BAD_ARGUMENT);
  CHECK_EQ(mr_route_new(&(mr_publish_args){.routing_key = longer}, &route), MR_BAD_ARGUMENT);

  /* nesting: the outermost table is the first level */
  for (int i = 0; i < MR_MAX_NESTING + 2; i++) {
    nest[i].key = BYTES("n");
    nest[i].value.kind = AMQP_FIELD_KIND_TABLE;
    nest[i].value.value.table =
        (amqp_table_t){.num_entries = 1, .entries = &nest[i + 1 < MR_MAX_NESTING + 2 ? i + 1 : i]};
  }
  nest[MR_MAX_NESTING - 1].value.kind = AMQP_FIELD_KIND_VOID;
  table = (amqp_table_t){.num_entries = 1, .entries = nest};
  CHECK_EQ(mr_table_depth_ok(&table), MR_OK);
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_OK);
  expect(p, 1, QUEUE_DECLARE, queue_declare);
  nest[MR_MAX_NESTING - 1].value.kind = AMQP_FIELD_KIND_TABLE;
  nest[MR_MAX_NESTING].value.kind = AMQP_FIELD_KIND_VOID;
  CHECK_EQ(mr_table_depth_ok(&table), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_BAD_ARGUMENT);
  nest[MR_MAX_NESTING].value.kind = AMQP_FIELD_KIND_TABLE;
  nest[MR_MAX_NESTING].value.value.table.entries = nest; /* a circle */
  CHECK_EQ(mr_table_depth_ok(&table), MR_BAD_ARGUMENT);
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_BAD_ARGUMENT);
  nest[0].key = longer;
  nest[0].value.kind = AMQP_FIELD_KIND_VOID;
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_BAD_ARGUMENT);
  nest[0].key = BYTES("n");
  nest[0].value.kind = 'z';
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_BAD_ARGUMENT);
  expect_nothing(p);
  peer_send(p, 1, QUEUE_DECLARE_OK, queue_declare_ok, .queue = BYTES("q"));
  expect_reply(p, channel, QUEUE_DECLARE_OK);
  expect_no_event(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_method_over_frame_max_is_refused(void) {
  mr_config config = peer_config();
  static char text[6000];
  amqp_table_entry_t entry = {.key = BYTES("big")};
  peer *p;
  mr_channel *channel;
  size_t fits;
  memset(text, 'b', sizeof text);
  config.frame_max = 4096;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  /* frame 8, method 4, ticket 2, queue 1+1, bits 1, table 4, key 1+3, kind 1, length 4 */
  fits = 4096 - (8 + 4 + 2 + 2 + 1 + 4 + 4 + 1 + 4);
  entry.value.kind = AMQP_FIELD_KIND_UTF8;
  entry.value.value.bytes = (amqp_bytes_t){.len = fits + 1, .bytes = text};
  amqp_table_t table = {.num_entries = 1, .entries = &entry};
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_TOO_LARGE);
  expect_nothing(p);
  entry.value.value.bytes.len = fits;
  CHECK_EQ(call(channel, QUEUE_DECLARE, queue_declare, .queue = BYTES("q"), .arguments = table),
           MR_OK);
  expect(p, 1, QUEUE_DECLARE, queue_declare);
  CHECK_EQ(p->frame.payload.len + 8, 4096);
  mr_channel_release(channel);
  peer_free(p);
}

static void methods_without_a_place_here_are_refused(void) {
  static const amqp_method_number_t methods[] = {AMQP_CONNECTION_START_METHOD,
                                                 AMQP_CONNECTION_OPEN_METHOD,
                                                 AMQP_BASIC_DELIVER_METHOD,
                                                 AMQP_QUEUE_DECLARE_OK_METHOD,
                                                 AMQP_BASIC_PUBLISH_METHOD,
                                                 0,
                                                 0xFFFFFFFFu,
                                                 0x003C0063u};
  static uint8_t arguments[256];
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
    if (mr_call(channel, methods[i], arguments) >= 0)
      FAIL("method %08x was sent", (unsigned)methods[i]);
  expect_nothing(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void update_secret(void) {
  static const uint8_t want[] = "\0\x0A\0\x46\0\0\0\3new\7renewed";
  peer *p = peer_open();
  mr_event *ev;
  CHECK_EQ(mr_engine_update_secret(p->engine, BYTES("new"), BYTES("renewed")) >= 0, 1);
  CHECK(peer_take(p, &p->frame));
  CHECK_EQ(p->frame.channel, 0);
  CHECK_BYTES(p->frame.payload.bytes, p->frame.payload.len, want, sizeof want - 1);
  peer_method(p, 0, MR_CONNECTION_UPDATE_SECRET_OK, NULL);
  ev = expect_event(p, MR_EV_REPLY);
  CHECK_EQ(ev->method.id, MR_CONNECTION_UPDATE_SECRET_OK);
  CHECK(ev->channel == NULL);
  CHECK(ev->method.decoded == NULL);
  peer_method(p, 0, MR_CONNECTION_UPDATE_SECRET_OK, NULL); /* nobody asked */
  expect_closed(p, MR_KIND_PROTOCOL);
  peer_free(p);
}

static void a_refused_secret_closes_the_connection(void) {
  peer *p = peer_open();
  CHECK_EQ(mr_engine_update_secret(p->engine, BYTES("new"), BYTES("renewed")) >= 0, 1);
  peer_discard(p);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 530,
            .reply_text = BYTES("NOT_ALLOWED - no"), .class_id = 10, .method_id = 70);
  CHECK_EQ(expect_event(p, MR_EV_CLOSED)->error.code, 530);
  peer_free(p);
}

static void qos_is_the_smallest_prefetch(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  CHECK_EQ(mr_channel_prefetch(channel), 0);
  peer_qos(p, channel, 50);
  peer_qos(p, channel, 300); /* nobody has the first */
  CHECK_EQ(mr_channel_prefetch(channel), 300);
  peer_consume(p, channel, "a", 1, false);
  peer_qos(p, channel, 100);
  CHECK_EQ(mr_channel_prefetch(channel), 100);
  mr_channel_release(channel);
  peer_free(p);
}

static void every_status_has_a_text(void) {
  for (int i = MR_UNKNOWN_TAG - 1; i <= MR_FLUSH + 1; i++) {
    const char *text = mr_status_text((mr_status)i);
    CHECK(text && *text);
  }
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(every_method_is_written_and_answered);
  RUN(consume_and_cancel);
  RUN(a_consumer_needs_its_tag_and_a_ref);
  RUN(get_answers_with_content_or_empty);
  RUN(nowait_expects_no_reply);
  RUN(a_consume_ok_may_pass_its_neighbours);
  RUN(a_cancel_ok_may_pass_its_neighbours);
  RUN(a_close_may_swallow_a_cancel_ok);
  RUN(pipelined_calls_are_answered_in_order);
  RUN(calls_overlap_for_long);
  RUN(a_wrong_reply_is_a_protocol_error);
  RUN(methods_of_a_client_are_a_protocol_error);
  RUN(bad_arguments_are_refused_before_a_byte_is_sent);
  RUN(a_method_over_frame_max_is_refused);
  RUN(methods_without_a_place_here_are_refused);
  RUN(update_secret);
  RUN(a_refused_secret_closes_the_connection);
  RUN(qos_is_the_smallest_prefetch);
  RUN(every_status_has_a_text);
  return check_end();
}
