/* Publishing: content over frame_max, routes, the header of mandatory publishes, the confirm window. */
#include "peer.h"
/* keep behind the headers above */
#include "malloc_hook.h"

static uint8_t *random_bytes(size_t n) {
  uint8_t *bytes = malloc(n + 1);
  if (!bytes) abort();
  for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)check_random();
  return bytes;
}

/* ---- content ---- */

static void bodies_are_split_by_frame_max(void) {
  static const uint32_t frame_maxes[] = {4096, 8192, 131072};
  for (size_t f = 0; f < sizeof frame_maxes / sizeof *frame_maxes; f++) {
    mr_config config = peer_config();
    size_t most = frame_maxes[f] - 8;
    size_t sizes[] = {
        0, 1, most - 1, most, most + 1, 2 * most - 1, 2 * most, 2 * most + 1, 5 * most + 77};
    peer *p;
    mr_channel *channel;
    config.frame_max = frame_maxes[f];
    p = peer_open_with(&config);
    channel = peer_channel(p);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
      uint8_t *body = random_bytes(sizes[i]), *got;
      size_t n, frames;
      uint64_t seq = 99;
      mr_status status = mr_publish(channel,
                                    &(mr_publish_args){.exchange = BYTES("ex"),
                                                       .routing_key = BYTES("key"),
                                                       .body = {.len = sizes[i], .bytes = body}},
                                    &seq);
      CHECK(status >= 0);
      CHECK_EQ(seq, 0);
      got = peer_take_publish(p, 1, &n, &frames);
      CHECK_BYTES(got, n, body, sizes[i]);
      CHECK_EQ(frames, (sizes[i] + most - 1) / most);
      expect_nothing(p);
      free(body);
      free(got);
    }
    mr_channel_release(channel);
    peer_free(p);
  }
}

static void the_publish_method_is_exact(void) {
  static const uint8_t want[] = "\0\x3C\0\x28\0\0\2ex\3key\1";
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  mr_publish_args args = {
      .exchange = BYTES("ex"), .routing_key = BYTES("key"), .mandatory = true, .body = BYTES("b")};
  CHECK(mr_publish(channel, &args, NULL) >= 0);
  expect(p, 1, BASIC_PUBLISH, basic_publish);
  CHECK_BYTES(p->frame.payload.bytes, p->frame.payload.len, want, sizeof want - 1);
  /* no confirms: nothing to correlate */
  peer_expect_type(p, 1, AMQP_FRAME_HEADER);
  CHECK_BYTES(p->frame.props.bytes, p->frame.props.len, "\0\0", 2);
  peer_expect_type(p, 1, AMQP_FRAME_BODY);
  expect_nothing(p);
  mr_channel_release(channel);
  peer_free(p);
}

static amqp_bytes_t encode(const amqp_basic_properties_t *props) {
  uint8_t *bytes = NULL;
  size_t n = 0;
  CHECK_EQ(mr_props_encode(props, &bytes, &n), MR_OK);
  return (amqp_bytes_t){.len = n, .bytes = bytes};
}

static void properties_are_sent_as_they_are(void) {
  amqp_table_entry_t entry = {.key = BYTES("h"),
                              .value = {.kind = AMQP_FIELD_KIND_BOOLEAN, .value = {.boolean = 1}}};
  amqp_basic_properties_t props = {._flags =
                                       AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_HEADERS_FLAG |
                                       AMQP_BASIC_DELIVERY_MODE_FLAG | AMQP_BASIC_CLUSTER_ID_FLAG,
                                   .content_type = BYTES("text/plain"),
                                   .headers = {.num_entries = 1, .entries = &entry},
                                   .delivery_mode = 2,
                                   .cluster_id = BYTES("c")};
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  amqp_bytes_t raw = encode(&props);
  mr_publish_args args = {.props = raw, .body = BYTES("b")};
  CHECK(mr_publish(channel, &args, NULL) >= 0);
  expect(p, 1, BASIC_PUBLISH, basic_publish);
  peer_expect_type(p, 1, AMQP_FRAME_HEADER);
  CHECK_BYTES(p->frame.props.bytes, p->frame.props.len, raw.bytes, raw.len);
  free(raw.bytes);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_body_over_max_message_size_is_refused(void) {
  mr_config config = peer_config();
  uint8_t *body = random_bytes(10001);
  uint64_t seq = 0;
  peer *p;
  mr_channel *channel;
  mr_publish_args args = {.body = {.len = 10001, .bytes = body}};
  config.max_message_size = 10000;
  p = peer_open_with(&config);
  channel = peer_confirm_channel(p);
  CHECK_EQ(mr_publish(channel, &args, &seq), MR_TOO_LARGE);
  CHECK_EQ(mr_confirm_unsettled(channel), 0);
  expect_nothing(p);
  args.body.len = 10000;
  CHECK(mr_publish(channel, &args, &seq) >= 0);
  CHECK_EQ(seq, 1);
  free(body);
  mr_channel_release(channel);
  peer_free(p);
}

/* The header frame of a mandatory publish counts its own header. */
static void a_header_frame_over_frame_max_is_refused(void) {
  for (int mandatory = 0; mandatory < 2; mandatory++) {
    mr_config config = peer_config();
    static char text[8000];
    amqp_table_entry_t entry = {.key = BYTES("h"), .value = {.kind = AMQP_FIELD_KIND_UTF8}};
    amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG};
    size_t largest = 0;
    peer *p;
    mr_channel *channel;
    memset(text, 't', sizeof text);
    config.frame_max = 4096;
    p = peer_open_with(&config);
    channel = peer_confirm_channel(p);
    props.headers = (amqp_table_t){.num_entries = 1, .entries = &entry};
    for (size_t n = 3900; n < 4200; n++) {
      mr_publish_args args = {.mandatory = mandatory, .body = BYTES("b")};
      uint64_t before = mr_confirm_next(channel);
      mr_status status;
      entry.value.value.bytes = (amqp_bytes_t){.len = n, .bytes = text};
      args.props = encode(&props);
      status = mr_publish(channel, &args, NULL);
      free(args.props.bytes);
      if (status == MR_TOO_LARGE) {
        CHECK_EQ(mr_confirm_next(channel), before);
        expect_nothing(p);
        continue;
      }
      CHECK(status >= 0);
      CHECK_EQ(largest, n == 3900 ? 0 : n - 1); /* the border is passed once */
      largest = n;
      expect(p, 1, BASIC_PUBLISH, basic_publish);
      peer_expect_type(p, 1, AMQP_FRAME_HEADER); /* fails when over frame_max */
      peer_expect_type(p, 1, AMQP_FRAME_BODY);
    }
    /* frame 8, class .. size 12, flags 2, table 4, key 2, kind 1, length 4 */
    if (!mandatory) CHECK_EQ(largest, 4096 - 8 - 12 - 2 - 4 - 2 - 1 - 4);
    /* and "moonrabbit-seq": 1 + 14, kind 1, a number of 8 */
    if (mandatory) CHECK_EQ(largest, 4096 - 8 - 12 - 2 - 4 - 2 - 1 - 4 - 24);
    mr_channel_release(channel);
    peer_free(p);
  }
}

/* ---- routes ---- */

static void a_route_is_a_plain_publish_byte_for_byte(void) {
  for (int round = 0; round < 300; round++) {
    mr_config config = peer_config();
    amqp_table_entry_t entries[3] = {
        {.key = BYTES("a"), .value = {.kind = AMQP_FIELD_KIND_I64, .value = {.i64 = 5}}},
        {.key = BYTES(MR_SEQ_HEADER),
         .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("theirs")}}},
        {.key = BYTES("z"), .value = {.kind = AMQP_FIELD_KIND_VOID}}};
    amqp_basic_properties_t props = {
        .content_type = BYTES("t"), .delivery_mode = 2, .message_id = BYTES("id")};
    bool confirm = check_below(2), with_props = check_below(4) != 0;
    size_t n = check_below(3) ? check_below(200) : check_below(10000);
    uint8_t *body = random_bytes(n);
    mr_publish_args args = {.exchange = BYTES("exchange"),
                            .routing_key = BYTES("the.key"),
                            .mandatory = check_below(2)};
    mr_route *route = NULL;
    peer *a, *b;
    mr_channel *one, *other;
    config.frame_max = 4096;
    if (check_below(2)) props._flags |= AMQP_BASIC_CONTENT_TYPE_FLAG;
    if (check_below(2)) props._flags |= AMQP_BASIC_DELIVERY_MODE_FLAG;
    if (check_below(2)) props._flags |= AMQP_BASIC_MESSAGE_ID_FLAG;
    if (check_below(2)) props._flags |= AMQP_BASIC_HEADERS_FLAG;
    props.headers = (amqp_table_t){.num_entries = (int)check_below(4), .entries = entries};
    if (with_props) args.props = encode(&props);
    a = peer_open_with(&config);
    b = peer_open_with(&config);
    one = confirm ? peer_confirm_channel(a) : peer_channel(a);
    other = confirm ? peer_confirm_channel(b) : peer_channel(b);
    CHECK_EQ(mr_route_new(&args, &route), MR_OK);
    args.body = (amqp_bytes_t){.len = n, .bytes = body};
    for (int i = 0; i < 3; i++) {
      uint64_t seq_a = 77, seq_b = 78;
      CHECK(mr_publish(one, &args, &seq_a) >= 0);
      CHECK(mr_publish_route(other, route, args.body, &seq_b) >= 0);
      CHECK_EQ(seq_a, confirm ? i + 1 : 0);
      CHECK_EQ(seq_b, seq_a);
    }
    peer_pull(a);
    peer_pull(b);
    CHECK_BYTES(b->from_client.data, b->from_client.len, a->from_client.data, a->from_client.len);
    mr_channel_release(one);
    mr_channel_release(other);
    peer_free(a);
    if (check_below(2)) { /* a route belongs to no engine */
      peer_free(b);
      mr_route_free(route);
    } else {
      mr_route_free(route);
      peer_free(b);
    }
    free(args.props.bytes);
    free(body);
  }
}

static void a_stamped_route_has_the_number_in_its_message_id(void) {
  for (int round = 0; round < 100; round++) {
    amqp_table_entry_t entry = {.key = BYTES("a"),
                                .value = {.kind = AMQP_FIELD_KIND_I64, .value = {.i64 = 5}}};
    amqp_basic_properties_t props = {._flags = AMQP_BASIC_MESSAGE_ID_FLAG,
                                     .message_id = BYTES("publisher-000000000000"),
                                     .app_id = BYTES("app")};
    peer *a = peer_open(), *b = peer_open();
    bool confirm = check_below(2);
    mr_channel *one = confirm ? peer_confirm_channel(a) : peer_channel(a);
    mr_channel *other = confirm ? peer_confirm_channel(b) : peer_channel(b);
    mr_publish_args args = {.routing_key = BYTES("k"), .mandatory = check_below(2)};
    mr_route *route = NULL;
    if (check_below(2)) props._flags |= AMQP_BASIC_HEADERS_FLAG;
    if (check_below(2)) props._flags |= AMQP_BASIC_APP_ID_FLAG;
    props.headers = (amqp_table_t){.num_entries = 1, .entries = &entry};
    args.props = encode(&props);
    CHECK_EQ(mr_route_new(&args, &route), MR_OK);
    free(args.props.bytes);
    CHECK_EQ(mr_route_stamp(route, 77), MR_OK);
    CHECK_EQ(mr_route_stamp(route, 0xABC0123456789Full), MR_OK); /* the lowest twelve digits */
    props.message_id = BYTES("publisher-c0123456789f");
    args.props = encode(&props);
    args.body = BYTES("body");
    CHECK(mr_publish(one, &args, NULL) >= 0);
    CHECK(mr_publish_route(other, route, args.body, NULL) >= 0);
    peer_pull(a);
    peer_pull(b);
    CHECK_BYTES(b->from_client.data, b->from_client.len, a->from_client.data, a->from_client.len);
    free(args.props.bytes);
    mr_route_free(route);
    mr_channel_release(one);
    mr_channel_release(other);
    peer_free(a);
    peer_free(b);
  }
}

static void a_route_without_room_for_the_number_is_not_stamped(void) {
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_MESSAGE_ID_FLAG,
                                   .message_id = BYTES("00000000000")};
  mr_publish_args args = {.routing_key = BYTES("k"), .mandatory = true};
  mr_route *route = NULL;
  CHECK_EQ(mr_route_new(&args, &route), MR_OK);
  CHECK_EQ(mr_route_stamp(route, 1), MR_BAD_ARGUMENT);
  mr_route_free(route);
  args.props = encode(&props);
  CHECK_EQ(mr_route_new(&args, &route), MR_OK);
  CHECK_EQ(mr_route_stamp(route, 1), MR_BAD_ARGUMENT);
  mr_route_free(route);
  free(args.props.bytes);
}

static void malformed_properties_are_refused(void) {
  static uint8_t bad[][6] = {{0x20, 0, 0, 0, 9, 9}, {0, 1}, {0x80, 0, 200}, {0}};
  static const size_t sizes[] = {6, 2, 3, 1};
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  for (size_t i = 0; i < 4; i++) {
    mr_publish_args args = {
        .mandatory = true, .props = {.len = sizes[i], .bytes = bad[i]}, .body = BYTES("b")};
    mr_route *route = NULL;
    CHECK_EQ(mr_route_new(&args, &route), MR_BAD_ARGUMENT);
    CHECK_EQ(mr_publish(channel, &args, NULL), MR_BAD_ARGUMENT);
    CHECK_EQ(mr_confirm_next(channel), 1);
  }
  expect_nothing(p);
  mr_channel_release(channel);
  peer_free(p);
}

/* ---- the header of mandatory publishes ---- */

/* Decodes the properties of the frame just taken. */
static amqp_basic_properties_t *decoded(peer *p) {
  amqp_basic_properties_t *props = NULL;
  const char *wrong = mr_props_check(p->frame.props);
  if (wrong) FAIL("properties: %s", wrong);
  CHECK_EQ(mr_props_decode(p->frame.props, &p->pool, &props), MR_OK);
  return props;
}

static int seq_headers(const amqp_table_t *table, uint64_t *seq) {
  int found = 0;
  for (int i = 0; i < table->num_entries; i++) {
    const amqp_table_entry_t *e = &table->entries[i];
    if (e->key.len != strlen(MR_SEQ_HEADER) || memcmp(e->key.bytes, MR_SEQ_HEADER, e->key.len) != 0)
      continue;
    found++;
    switch (e->value.kind) {
      case AMQP_FIELD_KIND_I64: *seq = (uint64_t)e->value.value.i64; break;
      case AMQP_FIELD_KIND_U64: *seq = e->value.value.u64; break;
      default: FAIL("%s is of kind %c", MR_SEQ_HEADER, e->value.kind);
    }
  }
  return found;
}

static void mandatory_publishes_carry_their_number(void) {
  amqp_table_entry_t entries[3] = {
      {.key = BYTES("a"), .value = {.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = 1}}},
      {.key = BYTES(MR_SEQ_HEADER),
       .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("a liar's")}}},
      {.key = BYTES("z"), .value = {.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = 2}}}};
  static const int shapes[] = {-1, 0, 1, 2, 3}; /* no properties, then so many headers */
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  uint64_t want = 0;
  for (int round = 0; round < 3; round++)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
      amqp_basic_properties_t props = {._flags =
                                           AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_APP_ID_FLAG,
                                       .content_type = BYTES("ct"),
                                       .app_id = BYTES("app")};
      mr_publish_args args = {.mandatory = true, .body = BYTES("b")};
      amqp_basic_properties_t *got;
      uint64_t seq = 0, carried = 0;
      if (shapes[i] > 0) props._flags |= AMQP_BASIC_HEADERS_FLAG;
      props.headers = (amqp_table_t){.num_entries = shapes[i], .entries = entries};
      if (shapes[i] >= 0) args.props = encode(&props);
      CHECK(mr_publish(channel, &args, &seq) >= 0);
      free(args.props.bytes);
      CHECK_EQ(seq, ++want);
      CHECK(expect(p, 1, BASIC_PUBLISH, basic_publish)->mandatory);
      peer_expect_type(p, 1, AMQP_FRAME_HEADER);
      got = decoded(p);
      CHECK(got->_flags & AMQP_BASIC_HEADERS_FLAG);
      CHECK_EQ(seq_headers(&got->headers, &carried), 1);
      CHECK_EQ(carried, seq);
      if (shapes[i] >= 0) CHECK_TEXT(got->app_id, "app");
      CHECK_EQ(got->headers.num_entries, shapes[i] < 0   ? 1
                                         : shapes[i] < 2 ? shapes[i] + 1
                                                         : shapes[i]);
      peer_expect_type(p, 1, AMQP_FRAME_BODY);
    }
  /* without mandatory there is none to add; a foreign one stays */
  CHECK(peer_publish(channel, false, "b", NULL) >= 0);
  expect(p, 1, BASIC_PUBLISH, basic_publish);
  peer_expect_type(p, 1, AMQP_FRAME_HEADER);
  CHECK_BYTES(p->frame.props.bytes, p->frame.props.len, "\0\0", 2);
  mr_channel_release(channel);
  peer_free(p);
}

/* ---- confirms ---- */

static void expect_confirm_at(peer *p, mr_channel *channel, uint64_t first, uint64_t last,
                              mr_outcome outcome, const char *file, int line) {
  mr_event *ev = peer_expect_event(p, MR_EV_CONFIRM, file, line);
  if (ev->channel != channel || ev->confirm.first != first || ev->confirm.last != last ||
      ev->confirm.outcome != outcome)
    check_fail(file, line,
               "confirm of %" PRIu64 "..%" PRIu64 " as %d, not %" PRIu64 "..%" PRIu64 " as %d",
               ev->confirm.first, ev->confirm.last, ev->confirm.outcome, first, last, outcome);
}
#define expect_confirm(p, channel, first, last, outcome) \
  expect_confirm_at(p, channel, first, last, outcome, __FILE__, __LINE__)

static void publishes(peer *p, mr_channel *channel, int n) {
  for (int i = 0; i < n; i++) {
    mr_status status = peer_publish(channel, false, "b", NULL);
    CHECK(status >= 0);
    if (status == MR_FLUSH) peer_discard(p);
  }
  peer_discard(p);
}

static void single_and_multiple_confirms(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  CHECK_EQ(mr_confirm_next(channel), 1);
  CHECK_EQ(mr_confirm_unsettled(channel), 0);
  publishes(p, channel, 10);
  CHECK_EQ(mr_confirm_next(channel), 11);
  CHECK_EQ(mr_confirm_unsettled(channel), 10);
  CHECK_EQ(mr_confirm_oldest(channel), 1);
  for (uint64_t i = 1; i <= 10; i++) CHECK_EQ(mr_confirm_outcome(channel, i), MR_PENDING);
  peer_ack(p, 1, 1, false);
  expect_confirm(p, channel, 1, 1, MR_ACKED);
  CHECK_EQ(mr_confirm_oldest(channel), 2);
  peer_ack(p, 1, 4, true);
  expect_confirm(p, channel, 2, 4, MR_ACKED);
  CHECK_EQ(mr_confirm_outcome(channel, 4), MR_ACKED);
  CHECK_EQ(mr_confirm_outcome(channel, 5), MR_PENDING);
  /* out of order */
  peer_ack(p, 1, 7, false);
  expect_confirm(p, channel, 7, 7, MR_ACKED);
  CHECK_EQ(mr_confirm_oldest(channel), 5);
  CHECK_EQ(mr_confirm_unsettled(channel), 5);
  CHECK_EQ(mr_confirm_outcome(channel, 7), MR_ACKED);
  CHECK_EQ(mr_confirm_outcome(channel, 6), MR_PENDING);
  /* multiple over a hole */
  peer_ack(p, 1, 9, true);
  expect_confirm(p, channel, 5, 6, MR_ACKED);
  expect_confirm(p, channel, 8, 9, MR_ACKED);
  CHECK_EQ(mr_confirm_oldest(channel), 10);
  CHECK_EQ(mr_confirm_unsettled(channel), 1);
  peer_nack(p, 1, 10, false);
  expect_confirm(p, channel, 10, 10, MR_NACKED);
  CHECK_EQ(mr_confirm_unsettled(channel), 0);
  CHECK_EQ(mr_confirm_oldest(channel), 11);
  expect_no_event(p);
  expect_nothing(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_multiple_nack_is_reported_one_by_one(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  publishes(p, channel, 5);
  peer_ack(p, 1, 2, false);
  peer_nack(p, 1, 4, true);
  peer_ack(p, 1, 0, true); /* zero: all */
  expect_confirm(p, channel, 2, 2, MR_ACKED);
  expect_confirm(p, channel, 1, 1, MR_NACKED);
  expect_confirm(p, channel, 3, 3, MR_NACKED);
  expect_confirm(p, channel, 4, 4, MR_NACKED);
  expect_confirm(p, channel, 5, 5, MR_ACKED);
  expect_no_event(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_confirm_of_the_unknown_is_a_protocol_error(void) {
  static const struct {
    uint64_t tag;
    bool multiple, nack;
  } wrong[] = {{4, false, false},         {4, true, false},          {0, false, false},
               {1, false, false},         {UINT64_MAX, true, false}, {UINT64_MAX, false, true},
               {1ull << 63, false, false}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    peer *p = peer_open();
    mr_channel *channel = peer_confirm_channel(p);
    publishes(p, channel, 3);
    peer_ack(p, 1, 1, false);
    expect_confirm(p, channel, 1, 1, MR_ACKED);
    if (wrong[i].nack)
      peer_nack(p, 1, wrong[i].tag, wrong[i].multiple);
    else
      peer_ack(p, 1, wrong[i].tag, wrong[i].multiple);
    expect_closed(p, MR_KIND_PROTOCOL);
    CHECK_EQ(mr_confirm_outcome(channel, 2), MR_LOST);
    mr_channel_release(channel);
    peer_free(p);
  }
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p); /* no confirms at all */
  publishes(p, channel, 3);
  peer_ack(p, 1, 1, false);
  expect_closed(p, MR_KIND_PROTOCOL);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_hundred_thousand_at_once_cost_no_allocation(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_event ev;
  mr_channel_set_window(channel, 0);
  publishes(p, channel, 100000);
  CHECK_EQ(mr_confirm_unsettled(channel), 100000);
  CHECK(mr_confirm_capacity(channel) >= 100000);
  CHECK_EQ(mr_confirm_capacity(channel) & (mr_confirm_capacity(channel) - 1), 0);
  p->to_client.len = p->to_client.pos = 0;
  peer_ack(p, 1, 100000, true);
  CHECK(mr_engine_feed(p->engine, p->to_client.data, p->to_client.len, p->now) == p->to_client.len);
  hook.calls = 0;
  hook.on = true;
  mr_engine_next(p->engine, &ev);
  hook.on = false;
  p->to_client.len = 0;
  CHECK_EQ(hook.calls, 0);
  CHECK_EQ(ev.type, MR_EV_CONFIRM);
  CHECK_EQ(ev.confirm.first, 1);
  CHECK_EQ(ev.confirm.last, 100000);
  CHECK_EQ(mr_confirm_unsettled(channel), 0);
  expect_no_event(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_place_can_be_made_beforehand(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_channel_set_window(channel, 128);
  CHECK_EQ(mr_confirm_capacity(channel), 0);
  CHECK_EQ(mr_confirm_reserve(channel), MR_OK);
  CHECK_EQ(mr_confirm_reserve(channel), MR_OK);
  CHECK_EQ(mr_confirm_capacity(channel), 64);
  CHECK_EQ(mr_confirm_held(channel), 0);
  publishes(p, channel, 64);
  CHECK_EQ(mr_confirm_held(channel), 64);
  CHECK_EQ(mr_confirm_capacity(channel), 64);
  hook.calls = 0;
  hook.fail_at = 1;
  hook.on = true;
  CHECK_EQ(mr_confirm_reserve(channel), MR_NO_MEMORY);
  CHECK_EQ(mr_confirm_capacity(channel), 64);
  CHECK_EQ(mr_confirm_reserve(channel), MR_OK);
  CHECK_EQ(mr_confirm_capacity(channel), 128);
  hook.calls = hook.fail_at = 0;
  CHECK(peer_publish(channel, false, "b", NULL) >= 0);
  CHECK_EQ(hook.calls, 0);
  hook.on = false;
  publishes(p, channel, 63);
  CHECK_EQ(mr_confirm_reserve(channel), MR_WINDOW_FULL);
  CHECK_EQ(mr_confirm_capacity(channel), 128);
  peer_ack(p, 1, 1, false);
  expect_confirm(p, channel, 1, 1, MR_ACKED);
  CHECK_EQ(mr_confirm_held(channel), 127);
  CHECK_EQ(mr_confirm_reserve(channel), MR_OK);
  CHECK_EQ(mr_confirm_capacity(channel), 128);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_running_window_allocates_nothing(void) {
  if (!hook_works()) check_skip("malloc cannot be replaced here");
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_route *route = NULL;
  CHECK_EQ(
      mr_route_new(
          &(mr_publish_args){.exchange = BYTES("x"), .routing_key = BYTES("k"), .mandatory = true},
          &route),
      MR_OK);
  for (int i = 0; i < 5000; i++) {
    uint64_t seq = 0;
    size_t n;
    mr_event ev;
    p->to_client.len = p->to_client.pos = 0;
    peer_ack(p, 1, (uint64_t)i * 10 + 10, true);
    if (i == 1000) {
      hook.calls = 0;
      hook.on = true;
    }
    for (int k = 0; k < 10; k++)
      if (mr_publish_route(channel, route, BYTES("the same body"), &seq) < 0) abort();
    if (seq != (uint64_t)i * 10 + 10) abort();
    while (mr_engine_tx_peek(p->engine, &n)) mr_engine_tx_consume(p->engine, n, p->now);
    if (mr_engine_feed(p->engine, p->to_client.data, p->to_client.len, p->now) != p->to_client.len)
      abort();
    while (mr_engine_next(p->engine, &ev) != MR_EV_NONE)
      if (ev.type != MR_EV_CONFIRM || ev.confirm.last != seq) abort();
  }
  hook.on = false;
  p->to_client.len = p->to_client.pos = 0;
  CHECK_EQ(hook.calls, 0);
  mr_route_free(route);
  mr_channel_release(channel);
  peer_free(p);
}

static void the_window_limits_what_is_unconfirmed(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_route *route = NULL;
  uint64_t seq = 0;
  CHECK_EQ(
      mr_route_new(&(mr_publish_args){.exchange = BYTES("x"), .routing_key = BYTES("k")}, &route),
      MR_OK);
  mr_channel_set_window(channel, 3);
  publishes(p, channel, 3);
  CHECK_EQ(peer_publish(channel, true, "b", &seq), MR_WINDOW_FULL);
  CHECK_EQ(mr_publish_route(channel, route, BYTES("b"), &seq), MR_WINDOW_FULL);
  CHECK_EQ(mr_confirm_next(channel), 4);
  expect_nothing(p);
  peer_ack(p, 1, 1, false);
  expect_confirm(p, channel, 1, 1, MR_ACKED);
  CHECK(peer_publish(channel, true, "b", &seq) >= 0);
  CHECK_EQ(seq, 4);
  CHECK_EQ(peer_publish(channel, true, "b", &seq), MR_WINDOW_FULL);
  mr_channel_set_window(channel, 4);
  CHECK(peer_publish(channel, true, "b", &seq) >= 0);
  CHECK_EQ(peer_publish(channel, true, "b", &seq), MR_WINDOW_FULL);
  mr_channel_set_window(channel, 1); /* narrower than what is out */
  peer_discard(p);
  peer_ack(p, 1, 4, true);
  expect_confirm(p, channel, 2, 4, MR_ACKED);
  CHECK_EQ(peer_publish(channel, true, "b", &seq), MR_WINDOW_FULL);
  peer_ack(p, 1, 5, false);
  expect_confirm(p, channel, 5, 5, MR_ACKED);
  CHECK(peer_publish(channel, true, "b", &seq) >= 0);
  CHECK_EQ(seq, 6);
  mr_route_free(route);
  mr_channel_release(channel);
  peer_free(p);
}

static void the_default_window_is_65536(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  for (int i = 0; i < 65536; i++) {
    CHECK(peer_publish(channel, false, "", NULL) >= 0);
    if (i % 4096 == 0) peer_discard(p);
  }
  CHECK_EQ(peer_publish(channel, false, "", NULL), MR_WINDOW_FULL);
  mr_channel_release(channel);
  peer_free(p);
}

/* Against a naive list: publishes, acks and nacks, single and multiple, in any order. */
static void confirms_follow_a_model(void) {
  enum { MOST = 2000 };
  for (int round = 0; round < 40; round++) {
    peer *p = peer_open();
    mr_channel *channel = peer_confirm_channel(p);
    static uint8_t model[MOST + 1];
    uint64_t next = 1, oldest = 1;
    uint32_t window = check_below(2) ? 0 : 1 + check_below(300);
    uint64_t unsettled = 0;
    p->split = (peer_split)check_below(3);
    mr_channel_set_window(channel, window);
    memset(model, MR_PENDING, sizeof model);
    for (int step = 0; step < 1500; step++) {
      uint64_t tag;
      bool multiple, nack;
      if (check_below(3) && next <= MOST) {
        uint64_t seq = 0;
        bool mandatory = check_below(2);
        mr_status status = peer_publish(channel, mandatory, "b", &seq);
        if (status == MR_WINDOW_FULL) {
          CHECK(window && next - oldest >= window);
        } else {
          CHECK(status >= 0);
          CHECK_EQ(seq, next);
          next++;
          unsettled++;
        }
        continue;
      }
      peer_discard(p);
      if (unsettled == 0) continue;
      do tag = oldest + check_below((uint32_t)(next - oldest));
      while (model[tag] != MR_PENDING);
      multiple = check_below(3) == 0;
      nack = check_below(4) == 0;
      if (nack)
        peer_nack(p, 1, tag, multiple);
      else
        peer_ack(p, 1, tag, multiple);
      while (peer_next(p) != MR_EV_NONE) {
        CHECK_EQ(p->event.type, MR_EV_CONFIRM);
        CHECK_EQ(p->event.confirm.outcome, nack ? MR_NACKED : MR_ACKED);
        if (nack) CHECK_EQ(p->event.confirm.first, p->event.confirm.last);
        for (uint64_t i = p->event.confirm.first; i <= p->event.confirm.last; i++) {
          CHECK(multiple ? i <= tag : i == tag);
          CHECK_EQ(model[i], MR_PENDING);
          model[i] = MR_ACKED;
          unsettled--;
        }
      }
      for (uint64_t i = multiple ? oldest : tag; i <= tag; i++) CHECK(model[i] != MR_PENDING);
      while (oldest < next && model[oldest] != MR_PENDING) oldest++;
      CHECK_EQ(mr_confirm_oldest(channel), oldest);
      CHECK_EQ(mr_confirm_unsettled(channel), unsettled);
      CHECK_EQ(mr_confirm_next(channel), next);
      for (uint64_t i = oldest; i < next; i++)
        CHECK_EQ(mr_confirm_outcome(channel, i) == MR_PENDING, model[i] == MR_PENDING);
    }
    mr_channel_release(channel);
    peer_free(p);
  }
}

/* ---- returns ---- */

static void peer_return(peer *p, uint16_t channel, const char *seq_header, int64_t seq,
                        const char *body) {
  amqp_table_entry_t entry = {.key = BYTES(seq_header),
                              .value = {.kind = AMQP_FIELD_KIND_I64, .value = {.i64 = seq}}};
  amqp_basic_properties_t props = {._flags = AMQP_BASIC_HEADERS_FLAG,
                                   .headers = {.num_entries = 1, .entries = &entry}};
  peer_send(p, channel, BASIC_RETURN, basic_return, .reply_code = 312,
            .reply_text = BYTES("NO_ROUTE"), .exchange = BYTES("x"), .routing_key = BYTES("k"));
  peer_content(p, channel, seq ? &props : NULL, body, strlen(body));
}

static void returns_find_their_publish(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_event *ev;
  for (int i = 1; i <= 6; i++) CHECK(peer_publish(channel, true, "b", NULL) >= 0);
  peer_discard(p);
  peer_return(p, 1, MR_SEQ_HEADER, 2, "two");
  ev = expect_event(p, MR_EV_RETURN);
  CHECK(ev->channel == channel);
  CHECK_EQ(ev->content.seq, 2);
  CHECK_EQ(ev->content.reply_code, 312);
  CHECK_TEXT(ev->content.reply_text, "NO_ROUTE");
  CHECK_TEXT(ev->content.exchange, "x");
  CHECK_TEXT(ev->content.routing_key, "k");
  CHECK_TEXT(ev->content.body, "two");
  CHECK_EQ(ev->content.delivery_tag, 0);
  CHECK_EQ(mr_confirm_outcome(channel, 2), MR_RETURNED);
  CHECK_EQ(mr_confirm_unsettled(channel), 6);
  CHECK_EQ(mr_unsettled(channel), 0);
  peer_return(p, 1, MR_SEQ_HEADER, 4, "");
  CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 4);
  peer_ack(p, 1, 5, true);
  expect_confirm(p, channel, 1, 1, MR_ACKED);
  expect_confirm(p, channel, 2, 2, MR_UNROUTABLE);
  expect_confirm(p, channel, 3, 3, MR_ACKED);
  expect_confirm(p, channel, 4, 4, MR_UNROUTABLE);
  expect_confirm(p, channel, 5, 5, MR_ACKED);
  peer_return(p, 1, MR_SEQ_HEADER, 6, "");
  expect_event(p, MR_EV_RETURN);
  peer_nack(p, 1, 6, false);
  expect_confirm(p, channel, 6, 6, MR_NACKED);
  expect_no_event(p);
  mr_channel_release(channel);
  peer_free(p);
}

static void returns_that_lie_are_not_believed(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p), *plain = peer_channel(p);
  static const int64_t lies[] = {0, 99, -1, INT64_MIN, INT64_MAX};
  for (int i = 1; i <= 2; i++) CHECK(peer_publish(channel, true, "b", NULL) >= 0);
  peer_discard(p);
  for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
    peer_return(p, 1, MR_SEQ_HEADER, lies[i], "b");
    CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 0);
  }
  peer_return(p, 1, "some-header", 1, "b");
  CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 0);
  peer_return(p, 2, MR_SEQ_HEADER, 1, "b"); /* no confirms there */
  CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 0);
  peer_return(p, 1, MR_SEQ_HEADER, 1, "b");
  CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 1);
  peer_return(p, 1, MR_SEQ_HEADER, 1, "b"); /* twice */
  CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 0);
  peer_ack(p, 1, 2, true);
  expect_confirm(p, channel, 1, 1, MR_UNROUTABLE);
  expect_confirm(p, channel, 2, 2, MR_ACKED);
  peer_return(p, 1, MR_SEQ_HEADER, 2, "b"); /* too late */
  CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, 0);
  expect_no_event(p);
  mr_channel_release(channel);
  mr_channel_release(plain);
  peer_free(p);
}

/* What a route sent is what comes back: the number in its header is its own. */
static void a_returned_route_finds_its_publish(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_route *route = NULL;
  CHECK_EQ(mr_route_new(&(mr_publish_args){.routing_key = BYTES("k"), .mandatory = true}, &route),
           MR_OK);
  for (uint64_t i = 1; i <= 300; i++) {
    uint64_t seq = 0;
    peer_frame *f;
    CHECK(mr_publish_route(channel, route, BYTES("b"), &seq) >= 0);
    CHECK_EQ(seq, i);
    expect(p, 1, BASIC_PUBLISH, basic_publish);
    f = peer_expect_type(p, 1, AMQP_FRAME_HEADER);
    peer_send(p, 1, BASIC_RETURN, basic_return, .reply_code = 312, .reply_text = BYTES("NO_ROUTE"));
    peer_header_raw(p, 1, 1, f->props);
    peer_body(p, 1, "b", 1);
    peer_discard(p);
    CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, i);
  }
  mr_route_free(route);
  mr_channel_release(channel);
  peer_free(p);
}

/* ---- the end ---- */

static void what_is_unsettled_at_the_end_is_lost(void) {
  for (int how = 0; how < 4; how++) {
    peer *p = peer_open();
    mr_channel *channel = peer_confirm_channel(p);
    publishes(p, channel, 4);
    peer_ack(p, 1, 2, true);
    expect_confirm(p, channel, 1, 2, MR_ACKED);
    peer_ack(p, 1, 4, false);
    expect_confirm(p, channel, 4, 4, MR_ACKED);
    switch (how) {
      case 0:
        peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 404,
                  .reply_text = BYTES("NOT_FOUND"));
        expect_event(p, MR_EV_CHANNEL_CLOSED);
        break;
      case 1:
        mr_engine_eof(p->engine, "cut");
        expect_event(p, MR_EV_CLOSED);
        break;
      case 2:
        CHECK(mr_channel_close(channel, 200, "bye") >= 0);
        peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
        expect_reply(p, channel, CHANNEL_CLOSE_OK);
        break;
      case 3: mr_engine_free(p->engine); break;
    }
    CHECK_EQ(mr_confirm_outcome(channel, 1), MR_ACKED);
    CHECK_EQ(mr_confirm_outcome(channel, 3), MR_LOST);
    CHECK_EQ(mr_confirm_outcome(channel, 4), MR_ACKED);
    CHECK_EQ(mr_confirm_unsettled(channel), 0);
    CHECK_EQ(peer_publish(channel, true, "b", NULL), MR_CLOSED);
    CHECK(!mr_channel_is_open(channel));
    mr_channel_release(channel);
    if (how == 3) p->engine = NULL;
    peer_free(p);
  }
}

static void what_was_lost_is_counted(void) {
  for (int how = 0; how < 4; how++) {
    peer *p = peer_open();
    mr_channel *channel = peer_confirm_channel(p);
    CHECK_EQ(mr_confirm_lost(channel), 0);
    publishes(p, channel, 10);
    peer_ack(p, 1, 2, true);
    peer_ack(p, 1, 7, false);
    expect_confirm(p, channel, 1, 2, MR_ACKED);
    expect_confirm(p, channel, 7, 7, MR_ACKED);
    CHECK_EQ(mr_confirm_lost(channel), 0);
    CHECK_EQ(mr_confirm_unsettled(channel), 7);
    switch (how) {
      case 0:
        peer_send(p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 404,
                  .reply_text = BYTES("NOT_FOUND"));
        expect_event(p, MR_EV_CHANNEL_CLOSED);
        break;
      case 1:
        mr_engine_eof(p->engine, "cut");
        expect_event(p, MR_EV_CLOSED);
        break;
      case 2:
        CHECK(mr_channel_close(channel, 200, "bye") >= 0);
        CHECK_EQ(mr_confirm_lost(channel), 0);
        peer_ack(p, 1, 3, false);
        expect_confirm(p, channel, 3, 3, MR_ACKED);
        peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
        expect_reply(p, channel, CHANNEL_CLOSE_OK);
        break;
      case 3:
        mr_engine_free(p->engine);
        p->engine = NULL;
        break;
    }
    CHECK_EQ(mr_confirm_lost(channel), how == 2 ? 6 : 7);
    CHECK_EQ(mr_confirm_unsettled(channel), 0);
    mr_channel_release(channel);
    peer_free(p);
  }
}

/* channel.close was sent, the broker's last confirms are still on their way. */
static void confirms_before_close_ok_still_count(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  publishes(p, channel, 2);
  CHECK(mr_channel_close(channel, 200, "bye") >= 0);
  peer_ack(p, 1, 1, false);
  peer_send(p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  expect_confirm(p, channel, 1, 1, MR_ACKED);
  expect_reply(p, channel, CHANNEL_CLOSE_OK);
  CHECK_EQ(mr_confirm_outcome(channel, 1), MR_ACKED);
  CHECK_EQ(mr_confirm_outcome(channel, 2), MR_LOST);
  mr_channel_release(channel);
  peer_free(p);
}

/* ---- the output buffer ---- */

static void max_buffer_bounds_the_output(void) {
  mr_config config = peer_config();
  peer *p;
  mr_channel *channel;
  uint8_t *body = random_bytes(20000);
  mr_publish_args args = {.body = {.len = 20000, .bytes = body}};
  mr_status status;
  int taken = 0;
  config.max_buffer = 100000;
  p = peer_open_with(&config);
  channel = peer_confirm_channel(p);
  while ((status = mr_publish(channel, &args, NULL)) >= 0) {
    CHECK(++taken < 100);
    CHECK(mr_engine_tx_pending(p->engine) < 100000 + 21000);
  }
  CHECK_EQ(status, MR_OVERFLOW);
  CHECK(taken >= 4);
  for (int i = 0; i < 1000 && (status = peer_publish(channel, true, "small", NULL)) >= 0; i++)
    taken++;
  CHECK_EQ(status, MR_OVERFLOW);
  CHECK(mr_engine_tx_pending(p->engine) <= 100000);
  CHECK_EQ(mr_confirm_unsettled(channel), taken);
  peer_discard(p);
  CHECK_EQ(mr_engine_tx_pending(p->engine), 0);
  CHECK(mr_publish(channel, &args, NULL) >= 0);
  free(body);
  mr_channel_release(channel);
  peer_free(p);
}

/* Also where the socket takes nothing: a try for each publish would be a system call each. */
static void a_flush_is_asked_for_every_256_kib(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  uint8_t *body = random_bytes(1000);
  mr_publish_args args = {.body = {.len = 1000, .bytes = body}};
  mr_status status;
  size_t asked = 0;
  while ((status = mr_publish(channel, &args, NULL)) >= 0) {
    if (status == MR_FLUSH) asked++;
    CHECK_EQ(asked, mr_engine_tx_pending(p->engine) / 262144);
  }
  CHECK_EQ(status, MR_OVERFLOW); /* at a megabyte, the default */
  CHECK_EQ(asked, 3);
  CHECK(mr_engine_tx_pending(p->engine) > (1 << 20) - 2000);
  free(body);
  mr_channel_release(channel);
  peer_free(p);
}

static void a_body_larger_than_max_buffer_can_be_sent(void) {
  mr_config config = peer_config();
  peer *p;
  mr_channel *channel;
  uint8_t *body = random_bytes(500000), *got;
  size_t n, frames;
  mr_publish_args args = {.body = {.len = 500000, .bytes = body}};
  config.max_buffer = 100000;
  p = peer_open_with(&config);
  channel = peer_channel(p);
  CHECK(mr_publish(channel, &args, NULL) >= 0);
  got = peer_take_publish(p, 1, &n, &frames);
  CHECK_BYTES(got, n, body, 500000);
  free(got);
  free(body);
  mr_channel_release(channel);
  peer_free(p);
}

static void small_writes_of_the_output_lose_nothing(void) {
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  p->split = PEER_RANDOM;
  for (int i = 0; i < 200; i++) {
    size_t sizes[2], frames;
    uint8_t *bodies[2];
    for (int k = 0; k < 2; k++) {
      size_t sent;
      const uint8_t *out;
      sizes[k] = check_below(300);
      bodies[k] = random_bytes(sizes[k]);
      CHECK(mr_publish(channel, &(mr_publish_args){.body = {.len = sizes[k], .bytes = bodies[k]}},
                       NULL) >= 0);
      /* a part leaves between two publishes */
      out = mr_engine_tx_peek(p->engine, &sent);
      CHECK(out);
      sent = check_below((uint32_t)sent + 1);
      peer_bytes(&p->from_client, out, sent);
      mr_engine_tx_consume(p->engine, sent, p->now);
    }
    for (int k = 0; k < 2; k++) {
      size_t n;
      uint8_t *got = peer_take_publish(p, 1, &n, &frames);
      CHECK_BYTES(got, n, bodies[k], sizes[k]);
      free(got);
      free(bodies[k]);
    }
    expect_nothing(p);
  }
  mr_channel_release(channel);
  peer_free(p);
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(bodies_are_split_by_frame_max);
  RUN(the_publish_method_is_exact);
  RUN(properties_are_sent_as_they_are);
  RUN(a_body_over_max_message_size_is_refused);
  RUN(a_header_frame_over_frame_max_is_refused);
  RUN(a_route_is_a_plain_publish_byte_for_byte);
  RUN(a_stamped_route_has_the_number_in_its_message_id);
  RUN(a_route_without_room_for_the_number_is_not_stamped);
  RUN(malformed_properties_are_refused);
  RUN(mandatory_publishes_carry_their_number);
  RUN(single_and_multiple_confirms);
  RUN(a_multiple_nack_is_reported_one_by_one);
  RUN(a_confirm_of_the_unknown_is_a_protocol_error);
  RUN(a_hundred_thousand_at_once_cost_no_allocation);
  RUN(a_place_can_be_made_beforehand);
  RUN(a_running_window_allocates_nothing);
  RUN(the_window_limits_what_is_unconfirmed);
  RUN(the_default_window_is_65536);
  RUN(confirms_follow_a_model);
  RUN(returns_find_their_publish);
  RUN(returns_that_lie_are_not_believed);
  RUN(a_returned_route_finds_its_publish);
  RUN(what_is_unsettled_at_the_end_is_lost);
  RUN(what_was_lost_is_counted);
  RUN(confirms_before_close_ok_still_count);
  RUN(max_buffer_bounds_the_output);
  RUN(a_flush_is_asked_for_every_256_kib);
  RUN(a_body_larger_than_max_buffer_can_be_sent);
  RUN(small_writes_of_the_output_lose_nothing);
  return check_end();
}
