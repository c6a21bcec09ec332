/*
 * Whole sessions. The first byte picks how far the session has come; then each byte is an operation
 * with operands behind it: raw bytes from the network, frames with any payload, well-formed
 * methods, commands of the user, the passing of time. Whatever comes: no crash, no leak, no publish
 * settled twice, nothing told after the end.
 */
#include "../core/peer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { CHANNELS = 3, MOST_SEQ = 4096 };

typedef struct {
  const uint8_t *at, *end;
  peer *p;
  mr_channel *channels[CHANNELS];
  uint8_t *settled[CHANNELS]; /* by sequence number */
  mr_route *route;
  uint64_t tag;
  volatile uint64_t sum; /* of all that events point to */
} fuzz;

static uint8_t take8(fuzz *f) { return f->at < f->end ? *f->at++ : 0; }
static uint16_t take16(fuzz *f) {
  uint8_t high = take8(f);
  return (uint16_t)(high << 8 | take8(f));
}

static amqp_bytes_t take_bytes(fuzz *f, size_t most) {
  size_t n = take8(f), left = (size_t)(f->end - f->at);
  amqp_bytes_t bytes;
  if (n > most) n = most;
  if (n > left) n = left;
  bytes = (amqp_bytes_t){.len = n, .bytes = (void *)(uintptr_t)f->at};
  f->at += n;
  return bytes;
}

static void touch(fuzz *f, amqp_bytes_t bytes) {
  for (size_t i = 0; i < bytes.len; i++) f->sum += ((const uint8_t *)bytes.bytes)[i];
}

static int index_of(fuzz *f, const mr_channel *channel) {
  for (int i = 0; i < CHANNELS; i++)
    if (f->channels[i] == channel) return i;
  FAIL("an event of a channel that was released");
}

static void on_confirm(fuzz *f, const mr_event *ev) {
  uint8_t *settled = f->settled[index_of(f, ev->channel)];
  CHECK(ev->confirm.first >= 1 && ev->confirm.first <= ev->confirm.last);
  CHECK(ev->confirm.last < mr_confirm_next(ev->channel));
  CHECK(ev->confirm.outcome >= MR_ACKED && ev->confirm.outcome <= MR_UNROUTABLE);
  for (uint64_t seq = ev->confirm.first; seq <= ev->confirm.last && seq < MOST_SEQ; seq++) {
    CHECK(!settled[seq]);
    settled[seq] = 1;
  }
}

static void events(fuzz *f, int most) {
  mr_event ev;
  while (most-- > 0) {
    mr_event_type type = mr_engine_next(f->p->engine, &ev);
    CHECK_EQ(type, ev.type);
    if (f->p->closed) CHECK_EQ(type, MR_EV_NONE);
    if (type == MR_EV_NONE) return;
    if (ev.channel) index_of(f, ev.channel);
    switch (type) {
      case MR_EV_DELIVER:
      case MR_EV_GET_OK:
      case MR_EV_RETURN:
        touch(f, ev.content.consumer_tag);
        touch(f, ev.content.exchange);
        touch(f, ev.content.routing_key);
        touch(f, ev.content.reply_text);
        touch(f, ev.content.props);
        touch(f, ev.content.body);
        CHECK(mr_props_check(ev.content.props) == NULL);
        if (type == MR_EV_DELIVER) CHECK(ev.content.consumer_ref);
        if (type != MR_EV_RETURN) f->tag = ev.content.delivery_tag;
        break;
      case MR_EV_CONFIRM: on_confirm(f, &ev); break;
      case MR_EV_CONSUMER_CANCEL: touch(f, ev.consumer_tag); break;
      case MR_EV_BLOCKED: touch(f, ev.text); break;
      case MR_EV_REPLY:
        if (ev.method.decoded && ev.method.id == AMQP_QUEUE_DECLARE_OK_METHOD)
          touch(f, ((amqp_queue_declare_ok_t *)ev.method.decoded)->queue);
        break;
      case MR_EV_CLOSED: f->p->closed = true; break;
      case MR_EV_CHANNEL_CLOSED: CHECK(!mr_channel_is_open(ev.channel)); break;
      default: break;
    }
  }
}

/* Hands over what is queued, in pieces of `piece`. */
static void feed(fuzz *f, size_t piece) {
  peer_buffer *b = &f->p->to_client;
  while (b->pos < b->len) {
    size_t n = b->len - b->pos, space = 0;
    if (piece && n > piece) n = piece;
    if (n & 1) {
      uint8_t *place = mr_engine_rx_reserve(f->p->engine, &space);
      if (n > space) n = space;
      if (place && n) memcpy(place, b->data + b->pos, n);
      if (place && n) mr_engine_rx_commit(f->p->engine, n, f->p->now);
    } else {
      n = mr_engine_feed(f->p->engine, b->data + b->pos, n, f->p->now);
    }
    b->pos += n;
    if (n == 0) {
      events(f, 100000);
      peer_discard(f->p);
      if (!mr_engine_rx_reserve(f->p->engine, &space)) break; /* it has ended */
    }
    if (piece) events(f, 100000);
  }
  b->len = b->pos = 0;
}

/* ---- the broker's side ---- */

static void broker_method(fuzz *f, uint8_t which) {
  peer *p = f->p;
  uint16_t ch = (uint16_t)(1 + take8(f) % (CHANNELS + 1));
  switch (which % 24) {
    case 0:
      peer_send(p, ch, BASIC_ACK, basic_ack, .delivery_tag = take8(f), .multiple = take8(f) & 1);
      break;
    case 1:
      peer_send(p, ch, BASIC_NACK, basic_nack, .delivery_tag = take8(f), .multiple = take8(f) & 1);
      break;
    case 2:
      peer_send(p, ch, BASIC_DELIVER, basic_deliver,
                .consumer_tag = BYTES(take8(f) & 1 ? "c" : "d"),
                .delivery_tag = f->tag + 1 + take8(f) % 3, .exchange = take_bytes(f, 200),
                .routing_key = take_bytes(f, 200));
      break;
    case 3: peer_header_raw(p, ch, take16(f), take_bytes(f, 255)); break;
    case 4: {
      amqp_bytes_t body = take_bytes(f, 255);
      peer_body(p, ch, body.bytes, body.len);
      break;
    }
    case 5: peer_deliver(p, ch, "c", ++f->tag, "body"); break;
    case 6:
      peer_send(p, ch, CHANNEL_CLOSE, channel_close, .reply_code = take16(f),
                .reply_text = take_bytes(f, 255));
      break;
    case 7: peer_send(p, ch, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0); break;
    case 8: peer_send(p, ch, CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES("")); break;
    case 9: peer_send(p, ch, CHANNEL_FLOW, channel_flow, .active = take8(f) & 1); break;
    case 10:
      peer_send(p, ch, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"),
                .nowait = take8(f) & 1);
      break;
    case 11: peer_send(p, ch, BASIC_CANCEL_OK, basic_cancel_ok, .consumer_tag = BYTES("c")); break;
    case 12: {
      amqp_table_entry_t entry = {
          .key = BYTES(MR_SEQ_HEADER),
          .value = {.kind = AMQP_FIELD_KIND_I64, .value = {.i64 = take8(f)}}};
      amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG,
                                       .headers = {.num_entries = 1, .entries = &entry}};
      peer_send(p, ch, BASIC_RETURN, basic_return, .reply_code = 312,
                .reply_text = BYTES("NO_ROUTE"));
      peer_content(p, ch, &props, "b", 1);
      break;
    }
    case 13: peer_send(p, ch, BASIC_GET_OK, basic_get_ok, .delivery_tag = ++f->tag); break;
    case 14: peer_send(p, ch, BASIC_GET_EMPTY, basic_get_empty, .cluster_id = BYTES("")); break;
    case 15:
      peer_send(p, ch, QUEUE_DECLARE_OK, queue_declare_ok, .queue = take_bytes(f, 255));
      break;
    case 16:
      peer_send(p, ch, BASIC_CONSUME_OK, basic_consume_ok, .consumer_tag = BYTES("c"));
      break;
    case 17: peer_send(p, ch, CONFIRM_SELECT_OK, confirm_select_ok, .dummy = 0); break;
    case 18: peer_send(p, ch, BASIC_RECOVER_OK, basic_recover_ok, .dummy = 0); break;
    case 19: peer_send(p, ch, TX_COMMIT_OK, tx_commit_ok, .dummy = 0); break;
    case 20: peer_send(p, ch, TX_ROLLBACK_OK, tx_rollback_ok, .dummy = 0); break;
    case 21:
      peer_send(p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = take_bytes(f, 255));
      break;
    case 22:
      peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = take16(f),
                .reply_text = take_bytes(f, 255));
      break;
    case 23: peer_send(p, ch, TX_SELECT_OK, tx_select_ok, .dummy = 0); break;
  }
}

/* ---- the user's side ---- */

static void publish(fuzz *f, int i) {
  mr_publish_args args = {.exchange = BYTES("x"), .routing_key = take_bytes(f, 255)};
  uint64_t seq = 0;
  args.mandatory = take8(f) & 1;
  args.props = take_bytes(f, 255);
  args.body = take_bytes(f, 255);
  if (mr_channel_is_confirm(f->channels[i]) && mr_confirm_next(f->channels[i]) >= MOST_SEQ) return;
  mr_publish(f->channels[i], &args, &seq);
}

static void user_call(fuzz *f, int i, uint8_t which) {
  mr_channel *ch = f->channels[i];
  amqp_basic_consume_t consume = {.queue = BYTES("q"),
                                  .consumer_tag = BYTES(which & 16 ? "c" : "d"),
                                  .no_ack = which >> 5 & 1,
                                  .nowait = which >> 6 & 1};
  amqp_boolean_t nowait = which >> 7;
  switch (which % 16) {
    case 0:
      call(ch, QUEUE_DECLARE, queue_declare, .queue = take_bytes(f, 255), .nowait = nowait);
      break;
    case 1: call(ch, BASIC_QOS, basic_qos, .prefetch_count = take8(f)); break;
    case 2: call(ch, BASIC_RECOVER, basic_recover, .requeue = 1); break;
    case 3: call(ch, BASIC_RECOVER_ASYNC, basic_recover_async, .requeue = 1); break;
    case 4: call(ch, TX_SELECT, tx_select, .dummy = 0); break;
    case 5: call(ch, TX_COMMIT, tx_commit, .dummy = 0); break;
    case 6: call(ch, TX_ROLLBACK, tx_rollback, .dummy = 0); break;
    case 7: call(ch, CONFIRM_SELECT, confirm_select, .nowait = nowait); break;
    case 8:
      call(ch, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"), .nowait = nowait);
      break;
    case 9: mr_consume(ch, &consume, 1 + i); break;
    case 10: mr_get(ch, BYTES("q"), nowait); break;
    case 11: mr_channel_close(ch, 200, "bye"); break;
    case 12: mr_channel_set_window(ch, take8(f)); break;
    case 13: mr_flush_acks(ch); break;
    case 14: mr_publish_route(ch, f->route, take_bytes(f, 255), NULL); break;
    case 15:
      mr_channel_release(ch);
      f->channels[i] = NULL;
      break;
  }
}

static void user(fuzz *f, uint8_t op) {
  int i = op % CHANNELS;
  peer *p = f->p;
  if (!f->channels[i]) {
    memset(f->settled[i], 0, MOST_SEQ);
    mr_channel_open(p->engine, &f->channels[i]);
    return;
  }
  switch (op / CHANNELS % 6) {
    case 0: publish(f, i); break;
    case 1:
    case 2: user_call(f, i, take8(f)); break;
    case 3: mr_settle(f->channels[i], take8(f), (mr_settle_kind)(take8(f) % 3), true); break;
    case 4:
      mr_settle(f->channels[i], f->tag - take8(f) % 4, (mr_settle_kind)(take8(f) % 3), false);
      break;
    case 5: mr_settle_upto(f->channels[i], take8(f), (mr_settle_kind)(take8(f) % 3), true); break;
  }
  if (!f->channels[i]) return;
  CHECK(mr_confirm_oldest(f->channels[i]) <= mr_confirm_next(f->channels[i]));
  CHECK(mr_confirm_unsettled(f->channels[i]) <=
        mr_confirm_next(f->channels[i]) - mr_confirm_oldest(f->channels[i]));
  mr_confirm_outcome(f->channels[i], take8(f));
}

static void step(fuzz *f) {
  peer *p = f->p;
  uint8_t op = take8(f);
  size_t n;
  if (op >= 96) {
    if (op < 192)
      broker_method(f, op);
    else
      user(f, op);
    return;
  }
  switch (op % 16) {
    case 0:
    case 1: {
      amqp_bytes_t raw = take_bytes(f, 255);
      peer_bytes(&p->to_client, raw.bytes, raw.len);
      break;
    }
    case 2:
    case 3: { /* a frame of anything */
      uint8_t type = take8(f), channel = take8(f);
      amqp_bytes_t payload = take_bytes(f, 255);
      peer_frame_of(p, type, channel % 5, payload.bytes, payload.len);
      break;
    }
    case 4: feed(f, 0); break;
    case 5: feed(f, 1 + take8(f) % 50u); break;
    case 6: events(f, 1); break;
    case 7: events(f, 100000); break;
    case 8:
      p->now += take8(f) / 16.0;
      mr_engine_deadline(p->engine, p->now);
      mr_engine_tick(p->engine, p->now);
      break;
    case 9: peer_discard(p); break;
    case 10:
      if (mr_engine_tx_peek(p->engine, &n))
        mr_engine_tx_consume(p->engine, take8(f) % (n + 1), p->now);
      break;
    case 11: mr_engine_pause(p->engine, take8(f) & 1, p->now); break;
    case 12: peer_heartbeat(p); break;
    case 13: mr_engine_update_secret(p->engine, take_bytes(f, 255), BYTES("why")); break;
    case 14:
      if (take8(f) == 'c') mr_engine_close(p->engine, 200, "bye");
      break;
    case 15:
      if (take8(f) == 'e') mr_engine_eof(p->engine, "cut");
      break;
  }
}

/* How far the session has come before the input speaks. */
static void begin(fuzz *f, uint8_t how) {
  mr_config config = peer_config();
  config.heartbeat = how & 32 ? 10 : 0;
  config.max_message_size = 20000;
  config.max_buffer = 50000;
  config.frame_max = 4096;
  config.mechanism = how & 64 ? "AMQPLAIN" : "PLAIN";
  f->p = peer_new(&config);
  f->p->frame_max = 4096;
  if (how % 8 == 0) return;
  if (how % 8 < 3) {
    CHECK_EQ(mr_engine_start(f->p->engine, f->p->now), MR_OK);
    if (how % 8 == 2) peer_start(f->p, "PLAIN AMQPLAIN");
    events(f, 10);
    return;
  }
  peer_handshake(f->p, 0, 4096, 10);
  if (how % 8 == 3) return;
  f->channels[0] = peer_confirm_channel(f->p);
  for (int i = 0; i < 10; i++) peer_publish(f->channels[0], i & 1, "b", NULL);
  peer_discard(f->p);
  if (how % 8 == 4) return;
  f->channels[1] = peer_channel(f->p);
  peer_qos(f->p, f->channels[1], 40);
  peer_consume(f->p, f->channels[1], "c", 2, false);
  for (f->tag = 1; f->tag <= 12; f->tag++) peer_deliver(f->p, 2, "c", f->tag, "b");
  feed(f, 0);
  events(f, 1000);
  if (how % 8 == 5) return;
  f->channels[2] = peer_channel(f->p);
  call(f->channels[2], TX_SELECT, tx_select, .dummy = 0);
  peer_send(f->p, 3, TX_SELECT_OK, tx_select_ok, .dummy = 0);
  expect_reply(f->p, f->channels[2], TX_SELECT_OK);
  peer_discard(f->p);
  peer_consume(f->p, f->channels[2], "c", 3, false);
  if (how % 8 == 6) return;
  mr_channel_close(f->channels[0], 200, "bye");
  mr_settle(f->channels[1], 3, MR_SETTLE_ACK, false);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.at = data, .end = data + size};
  bool before = false;
  if (size == 0 || size > 1 << 16) return 0;
  for (int i = 0; i < CHANNELS; i++) {
    f.settled[i] = calloc(1, MOST_SEQ);
    if (!f.settled[i]) abort();
  }
  CHECK_EQ(mr_route_new(&(mr_publish_args){.routing_key = BYTES("k"), .mandatory = true}, &f.route),
           MR_OK);
  begin(&f, take8(&f));
  while (f.at < f.end) step(&f);
  if (size & 1) { /* some channels go before the engine, some after it */
    mr_channel_release(f.channels[0]);
    f.channels[0] = NULL;
    before = true;
  }
  feed(&f, 0);
  events(&f, 100000);
  mr_engine_eof(f.p->engine, NULL);
  events(&f, 100000);
  CHECK(f.p->closed);
  if (size & 2) {
    mr_engine_free(f.p->engine);
    f.p->engine = NULL;
  }
  for (int i = before ? 1 : 0; i < CHANNELS; i++) {
    if (!f.channels[i]) continue;
    CHECK(!mr_channel_is_open(f.channels[i]));
    CHECK_EQ(mr_confirm_unsettled(f.channels[i]), 0);
    mr_settle(f.channels[i], 1, MR_SETTLE_ACK, false);
    peer_publish(f.channels[i], true, "b", NULL);
    mr_channel_release(f.channels[i]);
  }
  mr_route_free(f.route);
  for (int i = 0; i < CHANNELS; i++) free(f.settled[i]);
  peer_free(f.p);
  return 0;
}
