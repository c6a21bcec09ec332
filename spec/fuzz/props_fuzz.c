/*
 * Any bytes as properties: refused by mr_props_check, or decoded, encoded, edited, and published.
 * The first byte says how many header names follow, each with its length in one byte: those are
 * removed or set by the edit. The rest is the properties.
 */
#include "../core/peer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void edit(amqp_bytes_t raw, const amqp_bytes_t *names, size_t n) {
  amqp_table_entry_t entries[8];
  size_t n_set = n / 2, len = 0;
  amqp_table_t set = {.num_entries = (int)n_set, .entries = entries};
  uint8_t *out = NULL;
  for (size_t i = 0; i < n_set; i++) {
    entries[i].key = names[i];
    entries[i].value.kind = AMQP_FIELD_KIND_UTF8;
    entries[i].value.value.bytes = names[i];
  }
  CHECK_EQ(mr_props_edit(raw, names + n_set, n - n_set, &set, &out, &len), MR_OK);
  CHECK(mr_props_check((amqp_bytes_t){.len = len, .bytes = out}) == NULL);
  if (n == 0) CHECK_BYTES(out, len, raw.bytes, raw.len);
  free(out);
}

static void decode(amqp_bytes_t raw) {
  amqp_basic_properties_t *props = NULL, *again = NULL;
  amqp_bytes_t bytes;
  uint8_t *out = NULL;
  size_t len = 0;
  amqp_pool_t pool;
  init_amqp_pool(&pool, 4096);
  CHECK_EQ(mr_props_decode(raw, &pool, &props), MR_OK);
  CHECK_EQ(mr_props_encode(props, &out, &len), MR_OK);
  CHECK_EQ(len, raw.len);
  bytes = (amqp_bytes_t){.len = len, .bytes = out};
  CHECK(mr_props_check(bytes) == NULL);
  CHECK_EQ(mr_props_decode(bytes, &pool, &again), MR_OK);
  CHECK_EQ(again->_flags, props->_flags);
  free(out);
  empty_amqp_pool(&pool);
}

/* On a confirm channel, mandatory: the header with the number is put in. */
static void publish(amqp_bytes_t raw) {
  mr_publish_args args = {.routing_key = BYTES("k"), .mandatory = true, .props = raw};
  peer *p = peer_open();
  mr_channel *channel = peer_confirm_channel(p);
  mr_route *route = NULL;
  if (mr_publish(channel, &args, NULL) >= 0) {
    expect(p, 1, BASIC_PUBLISH, basic_publish);
    peer_expect_type(p, 1, AMQP_FRAME_HEADER);
    CHECK(mr_props_check(p->frame.props) == NULL);
  }
  CHECK_EQ(mr_route_new(&args, &route), MR_OK);
  if (mr_publish_route(channel, route, BYTES(""), NULL) >= 0) {
    expect(p, 1, BASIC_PUBLISH, basic_publish);
    peer_expect_type(p, 1, AMQP_FRAME_HEADER);
    CHECK(mr_props_check(p->frame.props) == NULL);
    /* and what comes back is found */
    peer_send(p, 1, BASIC_RETURN, basic_return, .reply_code = 312);
    peer_header_raw(p, 1, 0, p->frame.props);
    CHECK_EQ(expect_event(p, MR_EV_RETURN)->content.seq, mr_confirm_next(channel) - 1);
  }
  mr_route_free(route);
  mr_channel_release(channel);
  peer_free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  amqp_bytes_t names[8], raw;
  size_t n = 0, at = 1;
  const char *wrong;
  if (size == 0) return 0;
  for (size_t want = data[0] % 8; n < want && at < size; n++) {
    size_t len = data[at] < size - at - 1 ? data[at] : size - at - 1;
    names[n] = (amqp_bytes_t){.len = len, .bytes = (void *)(uintptr_t)(data + at + 1)};
    at += 1 + len;
  }
  if (at > size) at = size;
  raw = (amqp_bytes_t){.len = size - at, .bytes = (void *)(uintptr_t)(data + at)};
  wrong = mr_props_check(raw);
  if (wrong) {
    mr_route *route = NULL;
    mr_publish_args args = {.mandatory = true, .props = raw};
    CHECK(*wrong);
    if (raw.len) CHECK_EQ(mr_route_new(&args, &route), MR_BAD_ARGUMENT);
    return 0;
  }
  decode(raw);
  edit(raw, names, n);
  edit(raw, names, 0);
  publish(raw);
  return 0;
}
