/* Settling deliveries: what is gathered, when it leaves, and that a broker would agree with all of it. */
#include "core/ack.h"
#include "peer.h"

static void expect_ack_at(peer *p, uint16_t channel, uint64_t tag, bool multiple, const char *file,
                          int line) {
  amqp_basic_ack_t *ack = peer_expect(p, channel, AMQP_BASIC_ACK_METHOD, file, line);
  if (ack->delivery_tag != tag || !ack->multiple != !multiple)
    check_fail(file, line, "ack of %" PRIu64 "%s, not of %" PRIu64 "%s", ack->delivery_tag,
               ack->multiple ? " multiple" : "", tag, multiple ? " multiple" : "");
}
#define expect_ack(p, channel, tag, multiple) \
  expect_ack_at(p, channel, tag, multiple, __FILE__, __LINE__)

static void expect_nack(peer *p, uint64_t tag, bool multiple, bool requeue) {
  amqp_basic_nack_t *nack = expect(p, 1, BASIC_NACK, basic_nack);
  CHECK_EQ(nack->delivery_tag, tag);
  CHECK_EQ(!nack->multiple, !multiple);
  CHECK_EQ(!nack->requeue, !requeue);
}

static void expect_reject(peer *p, uint64_t tag, bool requeue) {
  amqp_basic_reject_t *reject = expect(p, 1, BASIC_REJECT, basic_reject);
  CHECK_EQ(reject->delivery_tag, tag);
  CHECK_EQ(!reject->requeue, !requeue);
}

/* Deliveries first..last arrive on consumer "c". */
static void deliver(peer *p, mr_channel *channel, uint64_t first, uint64_t last) {
  for (uint64_t tag = first; tag <= last; tag++)
    peer_deliver(p, mr_channel_id(channel), "c", tag, "b");
  for (uint64_t tag = first; tag <= last; tag++) {
    mr_event *ev = expect_event(p, MR_EV_DELIVER);
    CHECK_EQ(ev->content.delivery_tag, tag);
    CHECK(ev->channel == channel);
  }
}

static peer *consuming(mr_channel **channel, uint16_t prefetch) {
  mr_config config = peer_config();
  peer *p;
  config.ack_delay = 0.001;
  p = peer_open_with(&config);
  *channel = peer_channel(p);
  if (prefetch) peer_qos(p, *channel, prefetch);
  peer_consume(p, *channel, "c", 1, false);
  return p;
}

static void done(peer *p, mr_channel *channel) {
  expect_nothing(p);
  expect_no_event(p);
  CHECK(mr_engine_is_open(p->engine));
  mr_channel_release(channel);
  peer_free(p);
}

static mr_status ack(mr_channel *channel, uint64_t tag) {
  return mr_settle(channel, tag, MR_SETTLE_ACK, false);
}

static void write_acks(peer *p, mr_channel *channel) {
  (void)p;
  CHECK_EQ(mr_flush_acks(channel), MR_OK);
}

/* ---- gathering ---- */

static void the_settled_prefix_is_one_ack(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 5);
  CHECK_EQ(mr_unsettled(channel), 5);
  for (uint64_t tag = 1; tag <= 4; tag++) CHECK_EQ(ack(channel, tag), MR_OK);
  CHECK_EQ(mr_unsettled(channel), 1);
  CHECK_EQ(mr_engine_tx_pending(p->engine), 0);
  write_acks(p, channel);
  expect_ack(p, 1, 4, true);
  expect_nothing(p);
  CHECK_EQ(ack(channel, 5), MR_OK);
  write_acks(p, channel);
  expect_ack(p, 1, 5, false); /* one is no multiple */
  done(p, channel);
}

static void what_is_behind_an_outstanding_one_is_acked_singly(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 8);
  ack(channel, 1);
  ack(channel, 2);
  ack(channel, 5);
  ack(channel, 7);
  write_acks(p, channel);
  expect_ack(p, 1, 2, true);
  expect_ack(p, 1, 5, false);
  expect_ack(p, 1, 7, false);
  expect_nothing(p);
  /* now the prefix spans what is already settled, and names one that is not */
  ack(channel, 4);
  ack(channel, 3);
  ack(channel, 6);
  write_acks(p, channel);
  expect_ack(p, 1, 6, true);
  ack(channel, 8);
  write_acks(p, channel);
  expect_ack(p, 1, 8, false);
  CHECK_EQ(mr_unsettled(channel), 0);
  done(p, channel);
}

static void the_order_of_the_acks_does_not_matter(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 6);
  for (uint64_t tag = 6; tag >= 1; tag--) ack(channel, tag);
  write_acks(p, channel);
  expect_ack(p, 1, 6, true);
  done(p, channel);
}

static void nacks_and_rejects_leave_at_once(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 6);
  CHECK(mr_settle(channel, 2, MR_SETTLE_NACK, true) >= 0);
  expect_nack(p, 2, false, true);
  CHECK(mr_settle(channel, 4, MR_SETTLE_NACK, false) >= 0);
  expect_nack(p, 4, false, false);
  CHECK(mr_settle(channel, 5, MR_SETTLE_REJECT, false) >= 0);
  expect_reject(p, 5, false);
  CHECK(mr_settle(channel, 6, MR_SETTLE_REJECT, true) >= 0);
  expect_reject(p, 6, true);
  CHECK_EQ(mr_unsettled(channel), 2);
  done(p, channel);
}

/* A nack of 2 and an ack of 1..3: the nack must not come behind the ack that spans it. */
static void nacks_come_before_an_ack_that_spans_them(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 3);
  ack(channel, 1);
  ack(channel, 3);
  CHECK(mr_settle(channel, 2, MR_SETTLE_REJECT, true) >= 0);
  write_acks(p, channel);
  CHECK(peer_take(p, &p->frame));
  if (p->frame.method == AMQP_BASIC_ACK_METHOD) { /* an ack of 1 may come first */
    CHECK_EQ(((amqp_basic_ack_t *)p->frame.decoded)->delivery_tag, 1);
    CHECK(peer_take(p, &p->frame));
  }
  CHECK_EQ(p->frame.method, AMQP_BASIC_REJECT_METHOD);
  CHECK(peer_take(p, &p->frame));
  CHECK_EQ(p->frame.method, AMQP_BASIC_ACK_METHOD);
  CHECK_EQ(((amqp_basic_ack_t *)p->frame.decoded)->delivery_tag, 3);
  done(p, channel);
}

/* The last of the prefix was rejected: the multiple must name one that is acked itself. */
static void a_multiple_names_one_that_is_acked_itself(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 4);
  mr_settle(channel, 3, MR_SETTLE_REJECT, false);
  expect_reject(p, 3, false);
  ack(channel, 1);
  ack(channel, 2);
  write_acks(p, channel);
  expect_ack(p, 1, 2, true);
  ack(channel, 4);
  write_acks(p, channel);
  expect_ack(p, 1, 4, false);
  done(p, channel);
}

static void acks_go_in_front_of_what_else_leaves(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 2);
  ack(channel, 1);
  CHECK(call(channel, QUEUE_PURGE, queue_purge, .queue = BYTES("q")) >= 0);
  CHECK(peer_take(p, &p->frame));
  if (p->frame.method == AMQP_BASIC_ACK_METHOD) {
    expect(p, 1, QUEUE_PURGE, queue_purge);
  } else {
    CHECK_EQ(p->frame.method, AMQP_QUEUE_PURGE_METHOD);
    expect_ack(p, 1, 1, false);
  }
  done(p, channel);
}

static void nothing_leaves_before_its_time(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  size_t n;
  double due;
  deliver(p, channel, 1, 2);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  CHECK_EQ(ack(channel, 1), MR_OK);
  CHECK(mr_engine_tx_peek(p->engine, &n) == NULL);
  due = mr_engine_deadline(p->engine, p->now);
  CHECK(due > p->now && due <= p->now + 0.001001);
  p->now = due - 0.0005;
  mr_engine_tick(p->engine, p->now); /* early */
  CHECK(mr_engine_tx_peek(p->engine, &n) == NULL);
  CHECK(mr_engine_deadline(p->engine, p->now) == due); /* it does not slide */
  CHECK_EQ(ack(channel, 2), MR_OK);
  CHECK(mr_engine_deadline(p->engine, p->now) == due);
  p->now = due;
  mr_engine_tick(p->engine, p->now);
  expect_ack(p, 1, 2, true);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  done(p, channel);
}

static void without_a_delay_acks_leave_with_the_next_tick(void) {
  mr_config config = peer_config();
  mr_channel *channel;
  peer *p;
  double due;
  config.ack_delay = 0;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  peer_consume(p, channel, "c", 1, false);
  deliver(p, channel, 1, 1);
  CHECK(ack(channel, 1) >= 0);
  due = mr_engine_deadline(p->engine, p->now);
  CHECK(due >= 0 && due <= p->now);
  mr_engine_tick(p->engine, p->now);
  expect_ack(p, 1, 1, false);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  done(p, channel);
}

static void the_default_delay_is_a_millisecond(void) {
  mr_config config = peer_config();
  mr_channel *channel;
  peer *p;
  double due;
  config.ack_delay = -1;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  peer_consume(p, channel, "c", 1, false);
  deliver(p, channel, 1, 1);
  CHECK(ack(channel, 1) >= 0);
  due = mr_engine_deadline(p->engine, p->now);
  CHECK(due > p->now + 0.0009 && due < p->now + 0.0011);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_quarter_of_the_prefetch_asks_for_a_flush(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 40);
  deliver(p, channel, 1, 40);
  for (uint64_t tag = 1; tag <= 9; tag++) CHECK_EQ(ack(channel, tag), MR_OK);
  CHECK_EQ(ack(channel, 10), MR_FLUSH);
  expect_ack(p, 1, 10, true);
  for (uint64_t tag = 11; tag <= 19; tag++) CHECK_EQ(ack(channel, tag), MR_OK);
  expect_nothing(p);
  CHECK_EQ(ack(channel, 20), MR_FLUSH);
  expect_ack(p, 1, 20, true);
  done(p, channel);
}

static void small_prefetches_flush_each(void) {
  for (uint16_t prefetch = 1; prefetch <= 4; prefetch++) {
    mr_channel *channel;
    peer *p = consuming(&channel, prefetch);
    deliver(p, channel, 1, 1);
    CHECK_EQ(ack(channel, 1), MR_FLUSH);
    expect_ack(p, 1, 1, false);
    done(p, channel);
  }
}

static void acks_leave_before_what_needs_them(void) {
  for (int what = 0; what < 7; what++) {
    mr_channel *channel;
    peer *p = consuming(&channel, 100);
    deliver(p, channel, 1, 3);
    ack(channel, 1);
    ack(channel, 2);
    switch (what) {
      case 0:
        CHECK(call(channel, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c")) >= 0);
        expect_ack(p, 1, 2, true);
        expect(p, 1, BASIC_CANCEL, basic_cancel);
        break;
      case 1:
        CHECK(call(channel, BASIC_RECOVER, basic_recover, .requeue = 1) >= 0);
        expect_ack(p, 1, 2, true);
        expect(p, 1, BASIC_RECOVER, basic_recover);
        break;
      case 2:
        CHECK(call(channel, BASIC_RECOVER_ASYNC, basic_recover_async, .requeue = 1) >= 0);
        expect_ack(p, 1, 2, true);
        expect(p, 1, BASIC_RECOVER_ASYNC, basic_recover_async);
        break;
      case 3:
        CHECK(call(channel, TX_SELECT, tx_select, .dummy = 0) >= 0);
        expect_ack(p, 1, 2, true);
        expect(p, 1, TX_SELECT, tx_select);
        break;
      case 4:
        CHECK(mr_channel_close(channel, 200, "bye") >= 0);
        expect_ack(p, 1, 2, true);
        expect(p, 1, CHANNEL_CLOSE, channel_close);
        break;
      case 5:
        CHECK(mr_engine_close(p->engine, 200, "bye") >= 0);
        expect_ack(p, 1, 2, true);
        expect(p, 0, CONNECTION_CLOSE, connection_close);
        break;
      case 6:
        mr_channel_release(channel);
        channel = NULL;
        expect_ack(p, 1, 2, true);
        expect(p, 1, CHANNEL_CLOSE, channel_close);
        break;
    }
    expect_nothing(p);
    mr_channel_release(channel);
    peer_free(p);
  }
}

static void channels_gather_apart(void) {
  mr_channel *a, *b;
  peer *p = consuming(&a, 100);
  b = peer_channel(p);
  peer_consume(p, b, "c", 2, false);
  deliver(p, a, 1, 3);
  deliver(p, b, 1, 3);
  ack(a, 1);
  ack(b, 1);
  ack(b, 2);
  p->now = mr_engine_deadline(p->engine, p->now);
  mr_engine_tick(p->engine, p->now);
  CHECK(peer_take(p, &p->frame));
  if (p->frame.channel == 1) {
    expect_ack(p, 2, 2, true);
  } else {
    CHECK_EQ(p->frame.channel, 2);
    expect_ack(p, 1, 1, false);
  }
  mr_channel_release(b);
  expect(p, 2, CHANNEL_CLOSE, channel_close);
  done(p, a);
}

/* Writing stopped in the middle, for want of memory; what is acked meanwhile lies in front of that place. */
static void an_interrupted_flush_starts_again_at_the_front(void) {
  static const uint64_t order[] = {2, 4};
  mr_acks acks = {.items = NULL};
  mr_settlement s;
  for (uint64_t tag = 1; tag <= 4; tag++) CHECK_EQ(mr_acks_add(&acks, tag, false), MR_OK);
  CHECK_EQ(mr_acks_settle(&acks, 3, MR_SETTLE_ACK, false, &s), MR_OK);
  CHECK_EQ(mr_acks_settle(&acks, 4, MR_SETTLE_ACK, false, &s), MR_OK);
  CHECK(mr_acks_next(&acks, &s));
  CHECK_EQ(s.tag, 3);
  CHECK_EQ(mr_acks_settle(&acks, 2, MR_SETTLE_ACK, false, &s), MR_OK);
  for (size_t i = 0; i < 2; i++) {
    CHECK(mr_acks_next(&acks, &s));
    CHECK_EQ(s.tag, order[i]);
    CHECK(!s.multiple);
  }
  CHECK_EQ(acks.gathered, 0);
  CHECK_EQ(acks.outstanding, 1);
  mr_acks_free(&acks);
}

/* ---- mistakes ---- */

static void a_second_settle_is_refused(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 4);
  CHECK_EQ(ack(channel, 2), MR_OK);
  CHECK_EQ(ack(channel, 2), MR_SETTLED);
  CHECK_EQ(mr_settle(channel, 2, MR_SETTLE_NACK, true), MR_SETTLED);
  CHECK_EQ(mr_settle(channel, 2, MR_SETTLE_REJECT, true), MR_SETTLED);
  write_acks(p, channel);
  expect_ack(p, 1, 2, false);
  CHECK_EQ(ack(channel, 2), MR_SETTLED);
  CHECK(mr_settle(channel, 1, MR_SETTLE_NACK, true) >= 0);
  expect_nack(p, 1, false, true);
  CHECK_EQ(ack(channel, 1), MR_SETTLED);
  CHECK_EQ(ack(channel, 2), MR_SETTLED);
  CHECK_EQ(mr_unsettled(channel), 2);
  done(p, channel);
}

static void an_unknown_tag_is_refused(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  CHECK_EQ(ack(channel, 1), MR_UNKNOWN_TAG);
  deliver(p, channel, 1, 2);
  CHECK_EQ(ack(channel, 3), MR_UNKNOWN_TAG);
  CHECK_EQ(ack(channel, 0), MR_UNKNOWN_TAG);
  CHECK_EQ(mr_settle(channel, UINT64_MAX, MR_SETTLE_NACK, true), MR_UNKNOWN_TAG);
  CHECK_EQ(mr_settle_upto(channel, 3, MR_SETTLE_ACK, false) == MR_UNKNOWN_TAG ||
               mr_unsettled(channel) == 0,
           1);
  mr_channel_release(channel);
  peer_free(p);
}

static void deliveries_without_ack_never_enter(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  peer_consume(p, channel, "free", 2, true);
  peer_deliver(p, 1, "c", 1, "b");
  for (uint64_t tag = 2; tag <= 4; tag++) peer_deliver(p, 1, "free", tag, "b");
  peer_deliver(p, 1, "c", 5, "b");
  CHECK(!expect_event(p, MR_EV_DELIVER)->content.no_ack);
  for (int i = 0; i < 3; i++) {
    mr_event *ev = expect_event(p, MR_EV_DELIVER);
    CHECK(ev->content.no_ack);
    CHECK_EQ(ev->content.consumer_ref, 2);
  }
  expect_event(p, MR_EV_DELIVER);
  CHECK_EQ(mr_unsettled(channel), 2);
  CHECK(ack(channel, 3) < 0);
  ack(channel, 1);
  ack(channel, 5);
  write_acks(p, channel);
  expect_ack(p, 1, 5, true);
  done(p, channel);
}

/* RabbitMQ does not count what it delivers by direct reply-to. */
static void answers_of_direct_reply_to_share_a_tag(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  peer_consume(p, channel, "replies", 2, true);
  for (int i = 0; i < 2; i++) {
    peer_deliver(p, 1, "replies", 1, "answer");
    CHECK(expect_event(p, MR_EV_DELIVER)->content.no_ack);
  }
  deliver(p, channel, 1, 1);
  CHECK_EQ(mr_unsettled(channel), 1);
  peer_deliver(p, 1, "replies", 2, "answer");
  expect_event(p, MR_EV_DELIVER);
  deliver(p, channel, 2, 2);
  ack(channel, 1);
  ack(channel, 2);
  write_acks(p, channel);
  expect_ack(p, 1, 2, true);
  done(p, channel);
}

static void tags_that_do_not_grow_are_a_protocol_error(void) {
  static const uint64_t tags[] = {3, 2, 1, 0};
  for (size_t i = 0; i < sizeof tags / sizeof *tags; i++) {
    mr_channel *channel;
    peer *p = consuming(&channel, 100);
    deliver(p, channel, 1, 3);
    peer_deliver(p, 1, "c", tags[i], "b");
    expect_closed(p, MR_KIND_PROTOCOL);
    mr_channel_release(channel);
    peer_free(p);
  }
}

static void settling_after_the_end_is_closed(void) {
  for (int how = 0; how < 3; how++) {
    mr_channel *channel;
    peer *p = consuming(&channel, 100);
    deliver(p, channel, 1, 3);
    ack(channel, 1);
    switch (how) {
      case 0:
        peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 406,
                  .reply_text = BYTES("PRECONDITION_FAILED"));
        expect_event(p, MR_EV_CHANNEL_CLOSED);
        expect(p, 1, CHANNEL_CLOSE_OK, channel_close_ok);
        break;
      case 1:
        mr_engine_eof(p->engine, NULL);
        expect_event(p, MR_EV_CLOSED);
        break;
      case 2:
        CHECK(mr_channel_close(channel, 200, "bye") >= 0);
        peer_discard(p);
        break;
    }
    CHECK_EQ(ack(channel, 2), MR_CLOSED);
    CHECK_EQ(mr_settle(channel, 3, MR_SETTLE_NACK, true), MR_CLOSED);
    CHECK_EQ(mr_settle_upto(channel, 0, MR_SETTLE_ACK, false), MR_CLOSED);
    CHECK_EQ(mr_flush_acks(channel) >= 0 || mr_flush_acks(channel) == MR_CLOSED, 1);
    if (how != 1) expect_nothing(p);
    if (how != 2) CHECK_EQ(mr_unsettled(channel), 0);
    mr_channel_release(channel);
    peer_free(p);
  }
}

/* ---- settle up to ---- */

static void settle_upto_acks_everything_before(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 10);
  ack(channel, 4);
  CHECK(mr_settle_upto(channel, 6, MR_SETTLE_ACK, false) >= 0);
  CHECK_EQ(mr_unsettled(channel), 4);
  write_acks(p, channel);
  expect_ack(p, 1, 6, true);
  CHECK_EQ(ack(channel, 5), MR_SETTLED);
  CHECK(mr_settle_upto(channel, 0, MR_SETTLE_ACK, false) >= 0);
  write_acks(p, channel);
  expect_ack(p, 1, 10, true);
  CHECK_EQ(mr_unsettled(channel), 0);
  done(p, channel);
}

static void settle_upto_nacks_everything_before(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 10);
  ack(channel, 2);
  CHECK(mr_settle_upto(channel, 6, MR_SETTLE_NACK, true) >= 0);
  /* the ack of 2 was given first: the nack that spans it must not take it back */
  expect_ack(p, 1, 2, false);
  expect_nack(p, 6, true, true);
  CHECK_EQ(mr_unsettled(channel), 4);
  CHECK_EQ(ack(channel, 6), MR_SETTLED);
  CHECK_EQ(mr_settle_upto(channel, 0, MR_SETTLE_REJECT, true), MR_BAD_ARGUMENT);
  CHECK_EQ(mr_unsettled(channel), 4);
  done(p, channel);
}

/* 6 itself is settled already: the frame must name one that is outstanding. */
static void settle_upto_names_an_outstanding_tag(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 10);
  mr_settle(channel, 6, MR_SETTLE_REJECT, false);
  expect_reject(p, 6, false);
  CHECK(mr_settle_upto(channel, 6, MR_SETTLE_NACK, false) >= 0);
  expect_nack(p, 5, true, false);
  mr_settle(channel, 8, MR_SETTLE_REJECT, false);
  expect_reject(p, 8, false);
  CHECK(mr_settle_upto(channel, 8, MR_SETTLE_ACK, false) >= 0);
  write_acks(p, channel);
  expect_ack(p, 1, 7, false);
  CHECK_EQ(mr_unsettled(channel), 2);
  done(p, channel);
}

static void settle_upto_with_nothing_outstanding_sends_nothing(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  mr_settle_upto(channel, 0, MR_SETTLE_ACK, false);
  mr_settle_upto(channel, 0, MR_SETTLE_NACK, true);
  expect_nothing(p);
  deliver(p, channel, 1, 2);
  ack(channel, 1);
  ack(channel, 2);
  write_acks(p, channel);
  expect_ack(p, 1, 2, true);
  mr_settle_upto(channel, 0, MR_SETTLE_NACK, true);
  mr_settle_upto(channel, 2, MR_SETTLE_ACK, true);
  write_acks(p, channel);
  done(p, channel);
}

/* ---- recover ---- */

static void recover_empties_the_window(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 5);
  ack(channel, 2);
  CHECK(call(channel, BASIC_RECOVER, basic_recover, .requeue = 1) >= 0);
  expect_ack(p, 1, 2, false);
  expect(p, 1, BASIC_RECOVER, basic_recover);
  peer_send(p, 1, BASIC_RECOVER_OK, basic_recover_ok, .dummy = 0);
  expect_reply(p, channel, BASIC_RECOVER_OK);
  CHECK_EQ(mr_unsettled(channel), 0);
  CHECK(ack(channel, 1) < 0);
  CHECK(ack(channel, 5) < 0);
  write_acks(p, channel);
  expect_nothing(p);
  deliver(p, channel, 6, 9); /* they come again */
  ack(channel, 6);
  ack(channel, 7);
  write_acks(p, channel);
  expect_ack(p, 1, 7, true);
  done(p, channel);
}

/* Deliveries that were on their way when the broker read the recover are taken back as well. */
static void deliveries_before_recover_ok_are_taken_back(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 2);
  CHECK(call(channel, BASIC_RECOVER, basic_recover, .requeue = 1) >= 0);
  expect(p, 1, BASIC_RECOVER, basic_recover);
  deliver(p, channel, 3, 4);
  ack(channel, 3); /* the broker does not hold it any more: this must never be written */
  p->now += 1;
  mr_engine_tick(p->engine, p->now);
  CHECK(mr_settle(channel, 4, MR_SETTLE_REJECT, true) < 0 || !mr_engine_tx_pending(p->engine));
  expect_nothing(p);
  peer_send(p, 1, BASIC_RECOVER_OK, basic_recover_ok, .dummy = 0);
  expect_reply(p, channel, BASIC_RECOVER_OK);
  CHECK_EQ(mr_unsettled(channel), 0);
  ack(channel, 4);
  write_acks(p, channel);
  expect_nothing(p);
  deliver(p, channel, 5, 6);
  ack(channel, 5);
  write_acks(p, channel);
  expect_ack(p, 1, 5, false);
  done(p, channel);
}

static void what_recover_gave_back_is_closed(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 3);
  CHECK(call(channel, BASIC_RECOVER, basic_recover, .requeue = 1) >= 0);
  expect(p, 1, BASIC_RECOVER, basic_recover);
  CHECK_EQ(ack(channel, 1), MR_CLOSED);
  deliver(p, channel, 4, 4); /* was on its way */
  CHECK_EQ(ack(channel, 4), MR_CLOSED);
  peer_send(p, 1, BASIC_RECOVER_OK, basic_recover_ok, .dummy = 0);
  expect_reply(p, channel, BASIC_RECOVER_OK);
  for (uint64_t tag = 1; tag <= 4; tag++) {
    CHECK_EQ(ack(channel, tag), MR_CLOSED);
    CHECK_EQ(mr_settle(channel, tag, MR_SETTLE_NACK, true), MR_CLOSED);
  }
  CHECK_EQ(ack(channel, 5), MR_UNKNOWN_TAG);
  deliver(p, channel, 5, 5);
  CHECK_EQ(ack(channel, 5), MR_OK);
  CHECK_EQ(ack(channel, 5), MR_SETTLED);
  write_acks(p, channel);
  expect_ack(p, 1, 5, false);
  CHECK_EQ(ack(channel, 5), MR_SETTLED);
  done(p, channel);
}

/* ---- transactions ---- */

static peer *in_tx(mr_channel **channel) {
  peer *p = consuming(channel, 100);
  CHECK(call(*channel, TX_SELECT, tx_select, .dummy = 0) >= 0);
  expect(p, 1, TX_SELECT, tx_select);
  peer_send(p, 1, TX_SELECT_OK, tx_select_ok, .dummy = 0);
  expect_reply(p, *channel, TX_SELECT_OK);
  return p;
}

static void under_tx_nothing_is_gathered(void) {
  mr_channel *channel;
  peer *p = in_tx(&channel);
  deliver(p, channel, 1, 4);
  CHECK(ack(channel, 2) >= 0);
  expect_ack(p, 1, 2, false);
  CHECK(ack(channel, 1) >= 0);
  expect_ack(p, 1, 1, false);
  CHECK(mr_settle(channel, 3, MR_SETTLE_REJECT, true) >= 0);
  expect_reject(p, 3, true);
  CHECK_EQ(ack(channel, 3), MR_SETTLED);
  CHECK_EQ(mr_unsettled(channel), 1);
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  done(p, channel);
}

static void a_rollback_gives_back_what_it_took(void) {
  mr_channel *channel;
  peer *p = in_tx(&channel);
  deliver(p, channel, 1, 4);
  ack(channel, 1);
  mr_settle(channel, 3, MR_SETTLE_REJECT, true);
  peer_discard(p);
  CHECK_EQ(mr_unsettled(channel), 2);
  CHECK(call(channel, TX_ROLLBACK, tx_rollback, .dummy = 0) >= 0);
  expect(p, 1, TX_ROLLBACK, tx_rollback);
  peer_send(p, 1, TX_ROLLBACK_OK, tx_rollback_ok, .dummy = 0);
  expect_reply(p, channel, TX_ROLLBACK_OK);
  CHECK_EQ(mr_unsettled(channel), 4);
  CHECK(ack(channel, 1) >= 0);
  expect_ack(p, 1, 1, false);
  CHECK(ack(channel, 3) >= 0);
  expect_ack(p, 1, 3, false);
  CHECK(call(channel, TX_COMMIT, tx_commit, .dummy = 0) >= 0);
  expect(p, 1, TX_COMMIT, tx_commit);
  peer_send(p, 1, TX_COMMIT_OK, tx_commit_ok, .dummy = 0);
  expect_reply(p, channel, TX_COMMIT_OK);
  CHECK_EQ(ack(channel, 1), MR_SETTLED);
  CHECK_EQ(mr_unsettled(channel), 2);
  CHECK(call(channel, TX_ROLLBACK, tx_rollback, .dummy = 0) >= 0);
  expect(p, 1, TX_ROLLBACK, tx_rollback);
  peer_send(p, 1, TX_ROLLBACK_OK, tx_rollback_ok, .dummy = 0);
  expect_reply(p, channel, TX_ROLLBACK_OK);
  CHECK_EQ(ack(channel, 3), MR_SETTLED); /* what was committed stays */
  CHECK_EQ(mr_unsettled(channel), 2);
  done(p, channel);
}

static void settles_behind_a_pipelined_rollback_stay(void) {
  mr_channel *channel;
  peer *p = in_tx(&channel);
  deliver(p, channel, 1, 3);
  ack(channel, 1);
  CHECK(call(channel, TX_ROLLBACK, tx_rollback, .dummy = 0) >= 0);
  ack(channel, 2); /* of the next transaction */
  CHECK(call(channel, TX_COMMIT, tx_commit, .dummy = 0) >= 0);
  peer_discard(p);
  peer_send(p, 1, TX_ROLLBACK_OK, tx_rollback_ok, .dummy = 0);
  peer_send(p, 1, TX_COMMIT_OK, tx_commit_ok, .dummy = 0);
  expect_reply(p, channel, TX_ROLLBACK_OK);
  expect_reply(p, channel, TX_COMMIT_OK);
  CHECK_EQ(mr_unsettled(channel), 2); /* 1 and 3 */
  CHECK_EQ(ack(channel, 2), MR_SETTLED);
  CHECK(ack(channel, 1) >= 0);
  expect_ack(p, 1, 1, false);
  done(p, channel);
}

static void settle_upto_under_tx(void) {
  mr_channel *channel;
  peer *p = in_tx(&channel);
  deliver(p, channel, 1, 6);
  ack(channel, 2);
  expect_ack(p, 1, 2, false);
  CHECK(mr_settle_upto(channel, 4, MR_SETTLE_ACK, false) >= 0);
  expect_ack(p, 1, 4, true);
  CHECK_EQ(mr_unsettled(channel), 2);
  CHECK(call(channel, TX_ROLLBACK, tx_rollback, .dummy = 0) >= 0);
  expect(p, 1, TX_ROLLBACK, tx_rollback);
  peer_send(p, 1, TX_ROLLBACK_OK, tx_rollback_ok, .dummy = 0);
  expect_reply(p, channel, TX_ROLLBACK_OK);
  CHECK_EQ(mr_unsettled(channel), 6);
  done(p, channel);
}

/* The broker has put 2 back when it reads the ack of all up to 3, which therefore acks 2 as well. */
static void settle_upto_behind_a_rollback_spans_what_it_gave_back(void) {
  mr_channel *channel;
  peer *p = in_tx(&channel);
  deliver(p, channel, 1, 4);
  ack(channel, 2);
  expect_ack(p, 1, 2, false);
  CHECK(call(channel, TX_ROLLBACK, tx_rollback, .dummy = 0) >= 0);
  expect(p, 1, TX_ROLLBACK, tx_rollback);
  CHECK_EQ(mr_unsettled(channel), 4);
  CHECK(mr_settle_upto(channel, 3, MR_SETTLE_ACK, false) >= 0);
  expect_ack(p, 1, 3, true);
  peer_send(p, 1, TX_ROLLBACK_OK, tx_rollback_ok, .dummy = 0);
  expect_reply(p, channel, TX_ROLLBACK_OK);
  CHECK_EQ(mr_unsettled(channel), 1);
  CHECK_EQ(ack(channel, 2), MR_SETTLED); /* a second one would be a 406 */
  CHECK(ack(channel, 4) >= 0);
  expect_ack(p, 1, 4, false);
  done(p, channel);
}

/* ---- many ---- */

/* One that is never settled does not make the window grow for ever. */
static void a_straggler_costs_nothing(void) {
  mr_channel *channel;
  peer *p = consuming(&channel, 100);
  deliver(p, channel, 1, 1);
  for (uint64_t tag = 2; tag <= 200000; tag++) {
    p->to_client.len = p->to_client.pos = 0;
    peer_deliver(p, 1, "c", tag, "b");
    expect_event(p, MR_EV_DELIVER);
    CHECK(ack(channel, tag) >= 0);
    peer_discard(p);
    if (tag % 1000 == 0) {
      p->now += 1;
      mr_engine_tick(p->engine, p->now);
      peer_discard(p);
    }
  }
  mr_flush_acks(channel);
  peer_discard(p);
  CHECK_EQ(mr_unsettled(channel), 1);
  CHECK(ack(channel, 1) >= 0);
  write_acks(p, channel);
  expect_ack(p, 1, 1, false);
  done(p, channel);
}

/*
 * A naive broker: a set of tags it holds. It obeys what RabbitMQ obeys: an ack, nack or reject of a
 * tag it does not hold is a 406, a multiple takes all it holds up to its tag. It also remembers what
 * the user wanted for each tag, and fails the test when a frame does something else to it.
 */
enum { MOST = 4000 };
enum { UNSENT, HELD, ACKED, NACKED_TO_DROP, NACKED_TO_REQUEUE, TAKEN_BACK };

typedef struct {
  uint8_t broker[MOST + 1]; /* what the broker holds of a tag */
  uint8_t wanted[MOST + 1]; /* what the user did with it: HELD while nothing */
  uint64_t last;
  uint64_t recovered; /* the last when the broker took everything back */
} ack_model;

static ack_model model;

static void broker_settles(uint64_t tag, uint8_t how) {
  if (model.wanted[tag] != how)
    FAIL("tag %" PRIu64 ": settled as %d, the user wanted %d", tag, how, model.wanted[tag]);
  model.broker[tag] = how;
}

static void broker_reads(peer *p) {
  while (peer_take(p, &p->frame)) {
    uint64_t tag = 0;
    bool multiple = false;
    uint8_t how = ACKED;
    switch (p->frame.method) {
      case AMQP_BASIC_ACK_METHOD: {
        amqp_basic_ack_t *m = p->frame.decoded;
        tag = m->delivery_tag;
        multiple = m->multiple;
        break;
      }
      case AMQP_BASIC_NACK_METHOD: {
        amqp_basic_nack_t *m = p->frame.decoded;
        tag = m->delivery_tag;
        multiple = m->multiple;
        how = m->requeue ? NACKED_TO_REQUEUE : NACKED_TO_DROP;
        break;
      }
      case AMQP_BASIC_REJECT_METHOD: {
        amqp_basic_reject_t *m = p->frame.decoded;
        tag = m->delivery_tag;
        how = m->requeue ? NACKED_TO_REQUEUE : NACKED_TO_DROP;
        break;
      }
      case AMQP_BASIC_RECOVER_METHOD:
        for (uint64_t i = 1; i <= model.last; i++)
          if (model.broker[i] == HELD) model.broker[i] = TAKEN_BACK;
        peer_send(p, 1, BASIC_RECOVER_OK, basic_recover_ok, .dummy = 0);
        continue;
      default: FAIL("method %08x", (unsigned)p->frame.method);
    }
    if (tag == 0 || tag > model.last || model.broker[tag] != HELD)
      FAIL("406: unknown delivery tag %" PRIu64, tag);
    for (uint64_t i = multiple ? 1 : tag; i <= tag; i++)
      if (model.broker[i] == HELD) broker_settles(i, how);
  }
}

static uint64_t pick(uint8_t wanted) {
  for (int tries = 0; tries < 20; tries++) {
    uint64_t back = check_below(check_below(2) ? 8 : 200), tag;
    if (model.last == 0) return 0;
    tag = model.last > back ? model.last - back : 1 + check_below((uint32_t)model.last);
    if (model.wanted[tag] == wanted) return tag;
  }
  return 0;
}

static void random_settles_follow_a_model(void) {
  for (int round = 0; round < 60; round++) {
    mr_channel *channel;
    peer *p = consuming(&channel, (uint16_t)(check_below(3) ? 1 + check_below(500) : 0));
    memset(&model, 0, sizeof model);
    p->split = (peer_split)check_below(3);
    for (int step = 0; step < 3000; step++) {
      uint64_t tag;
      bool requeue = check_below(2);
      switch (check_below(24)) {
        default: /* deliveries */
          for (uint32_t n = 1 + check_below(5); n && model.last < MOST; n--) {
            model.last += check_below(10) || model.last + 2 > MOST
                              ? 1
                              : 2; /* no-ack deliveries take tags too */
            model.broker[model.last] = model.wanted[model.last] = HELD;
            peer_deliver(p, 1, "c", model.last, "b");
            CHECK_EQ(expect_event(p, MR_EV_DELIVER)->content.delivery_tag, model.last);
          }
          break;
        case 0:
        case 1:
        case 2:
        case 3:
        case 4:
        case 5:
        case 6:
        case 7:
        case 8:
          if ((tag = pick(HELD)) == 0) break;
          CHECK(ack(channel, tag) >= 0);
          model.wanted[tag] = ACKED;
          break;
        case 9:
        case 10:
          if ((tag = pick(HELD)) == 0) break;
          model.wanted[tag] = requeue ? NACKED_TO_REQUEUE : NACKED_TO_DROP;
          CHECK(mr_settle(channel, tag, check_below(2) ? MR_SETTLE_NACK : MR_SETTLE_REJECT,
                          requeue) >= 0);
          break;
        case 11:
          if ((tag = pick(ACKED)) == 0) break;
          CHECK_EQ(mr_settle(channel, tag, (mr_settle_kind)check_below(3), requeue),
                   tag > model.recovered ? MR_SETTLED : MR_CLOSED);
          break;
        case 12: CHECK_EQ(ack(channel, model.last + 1 + check_below(9)), MR_UNKNOWN_TAG); break;
        case 13: {
          bool to_ack = check_below(2);
          uint64_t upto = check_below(4) ? pick(HELD) : 0;
          if (upto == 0 && check_below(4)) break;
          for (uint64_t i = 1; i <= (upto ? upto : model.last); i++)
            if (model.wanted[i] == HELD)
              model.wanted[i] = to_ack ? ACKED : requeue ? NACKED_TO_REQUEUE : NACKED_TO_DROP;
          mr_status got =
              mr_settle_upto(channel, upto, to_ack ? MR_SETTLE_ACK : MR_SETTLE_NACK, requeue);
          CHECK(got >= 0);
          break;
        }
        case 14: broker_reads(p); break;
        case 15:
          p->now += 0.002;
          mr_engine_deadline(p->engine, p->now);
          mr_engine_tick(p->engine, p->now);
          break;
        case 16: CHECK(mr_flush_acks(channel) >= 0); break;
        case 17:
          if (check_below(20)) break;
          CHECK(call(channel, BASIC_RECOVER, basic_recover, .requeue = 1) >= 0);
          broker_reads(p);
          expect_reply(p, channel, BASIC_RECOVER_OK);
          for (uint64_t i = 1; i <= model.last; i++)
            if (model.wanted[i] == HELD) model.wanted[i] = TAKEN_BACK;
          model.recovered = model.last;
          break;
        case 18:
          if ((tag = pick(TAKEN_BACK)) == 0) break;
          CHECK_EQ(mr_settle(channel, tag, (mr_settle_kind)check_below(3), requeue), MR_CLOSED);
          break;
      }
      size_t unsettled = 0;
      for (uint64_t i = 1; i <= model.last; i++) unsettled += model.wanted[i] == HELD;
      CHECK_EQ(mr_unsettled(channel), unsettled);
    }
    CHECK(mr_flush_acks(channel) >= 0);
    broker_reads(p);
    for (uint64_t i = 1; i <= model.last; i++)
      if (model.broker[i] != model.wanted[i])
        FAIL("tag %" PRIu64 ": the user wanted %d, the broker has %d", i, model.wanted[i],
             model.broker[i]);
    done(p, channel);
  }
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(the_settled_prefix_is_one_ack);
  RUN(what_is_behind_an_outstanding_one_is_acked_singly);
  RUN(the_order_of_the_acks_does_not_matter);
  RUN(nacks_and_rejects_leave_at_once);
  RUN(nacks_come_before_an_ack_that_spans_them);
  RUN(a_multiple_names_one_that_is_acked_itself);
  RUN(acks_go_in_front_of_what_else_leaves);
  RUN(nothing_leaves_before_its_time);
  RUN(without_a_delay_acks_leave_with_the_next_tick);
  RUN(the_default_delay_is_a_millisecond);
  RUN(a_quarter_of_the_prefetch_asks_for_a_flush);
  RUN(small_prefetches_flush_each);
  RUN(acks_leave_before_what_needs_them);
  RUN(channels_gather_apart);
  RUN(an_interrupted_flush_starts_again_at_the_front);
  RUN(a_second_settle_is_refused);
  RUN(an_unknown_tag_is_refused);
  RUN(deliveries_without_ack_never_enter);
  RUN(answers_of_direct_reply_to_share_a_tag);
  RUN(tags_that_do_not_grow_are_a_protocol_error);
  RUN(settling_after_the_end_is_closed);
  RUN(settle_upto_acks_everything_before);
  RUN(settle_upto_nacks_everything_before);
  RUN(settle_upto_names_an_outstanding_tag);
  RUN(settle_upto_with_nothing_outstanding_sends_nothing);
  RUN(recover_empties_the_window);
  RUN(deliveries_before_recover_ok_are_taken_back);
  RUN(what_recover_gave_back_is_closed);
  RUN(under_tx_nothing_is_gathered);
  RUN(a_rollback_gives_back_what_it_took);
  RUN(settles_behind_a_pipelined_rollback_stay);
  RUN(settle_upto_under_tx);
  RUN(settle_upto_behind_a_rollback_spans_what_it_gave_back);
  RUN(a_straggler_costs_nothing);
  RUN(random_settles_follow_a_model);
  return check_end();
}
