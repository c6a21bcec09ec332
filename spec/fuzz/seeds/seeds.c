/*
 * Writes the seeds of the fuzzers of the core into <dir>/<fuzzer>/: what a broker really says.
 *
 *   cc -std=c11 -D_GNU_SOURCE -Icsrc spec/fuzz/seeds/seeds.c -lrabbitmq -o /tmp/seeds   (with the objects of csrc/core)
 *   /tmp/seeds spec/fuzz/corpus
 *
 * The corpora that are kept also hold inputs of long runs, minimized by `-merge=1`.
 */
#include "../../core/peer.h"

#include <sys/stat.h>

static const char *directory;
static int count;

static void save(const char *fuzzer, const void *bytes, size_t n) {
  char path[512];
  FILE *file;
  snprintf(path, sizeof path, "%s/%s", directory, fuzzer);
  mkdir(path, 0777);
  snprintf(path, sizeof path, "%s/%s/seed-%03d", directory, fuzzer, count++);
  file = fopen(path, "wb");
  if (!file || fwrite(bytes, 1, n, file) != n || fclose(file) != 0) FAIL("cannot write %s", path);
}

/* ---- tables and properties ---- */

static size_t properties(uint8_t *to, size_t space) {
  amqp_field_value_t items[] = {{.kind = AMQP_FIELD_KIND_I32, .value = {.i32 = -1}},
                                {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("item")}}};
  amqp_table_entry_t inner[] = {
      {.key = BYTES("queue"),
       .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("q")}}},
      {.key = BYTES("time"),
       .value = {.kind = AMQP_FIELD_KIND_TIMESTAMP, .value = {.u64 = 1700000000}}}};
  amqp_field_value_t death = {.kind = AMQP_FIELD_KIND_TABLE,
                              .value = {.table = {.num_entries = 2, .entries = inner}}};
  amqp_table_entry_t entries[] = {
      {.key = BYTES(MR_SEQ_HEADER), .value = {.kind = AMQP_FIELD_KIND_I64, .value = {.i64 = 1}}},
      {.key = BYTES("x-death"),
       .value = {.kind = AMQP_FIELD_KIND_ARRAY,
                 .value = {.array = {.num_entries = 1, .entries = &death}}}},
      {.key = BYTES("list"),
       .value = {.kind = AMQP_FIELD_KIND_ARRAY,
                 .value = {.array = {.num_entries = 2, .entries = items}}}},
      {.key = BYTES("b"), .value = {.kind = AMQP_FIELD_KIND_BOOLEAN, .value = {.boolean = 1}}},
      {.key = BYTES("i8"), .value = {.kind = AMQP_FIELD_KIND_I8, .value = {.i8 = -1}}},
      {.key = BYTES("u16"), .value = {.kind = AMQP_FIELD_KIND_U16, .value = {.u16 = 1}}},
      {.key = BYTES("f64"), .value = {.kind = AMQP_FIELD_KIND_F64, .value = {.f64 = 0.5}}},
      {.key = BYTES("dec"),
       .value = {.kind = AMQP_FIELD_KIND_DECIMAL, .value = {.decimal = {2, 314}}}},
      {.key = BYTES("void"), .value = {.kind = AMQP_FIELD_KIND_VOID}}};
  amqp_basic_properties_t props = {._flags = 0xFFFC,
                                   .content_type = BYTES("text/plain"),
                                   .content_encoding = BYTES("gzip"),
                                   .headers = {.num_entries = 9, .entries = entries},
                                   .delivery_mode = 2,
                                   .priority = 1,
                                   .correlation_id = BYTES("c"),
                                   .reply_to = BYTES("r"),
                                   .expiration = BYTES("1000"),
                                   .message_id = BYTES("m"),
                                   .timestamp = 1700000000,
                                   .type = BYTES("t"),
                                   .user_id = BYTES("guest"),
                                   .app_id = BYTES("a"),
                                   .cluster_id = BYTES("cl")};
  long n = mr_props_encode_to(&props, to, space);
  if (n < 0) FAIL("properties");
  return (size_t)n;
}

static void tables_and_properties(void) {
  static uint8_t bytes[2000];
  size_t n;
  bytes[0] = 2;
  memcpy(bytes + 1, "\1a\7x-death", 10);
  n = properties(bytes + 11, sizeof bytes - 11);
  save("props_fuzz", bytes, n + 11);
  save("props_fuzz", "\0\0\0", 3);
  save("props_fuzz", "\0\x10\0\2", 4);
  /* the headers stand behind flags, content type and encoding: 2 + 11 + 5 */
  save("table_fuzz", bytes + 11 + 18, 4 + (size_t)peer_from_be(bytes + 11 + 18, 4));
  save("table_fuzz", "\0\0\0\0", 4);
}

/* ---- methods: the index into METHODS of method_fuzz.c, a state, the arguments ---- */

static void method(uint8_t index, amqp_method_number_t number, void *decoded) {
  uint8_t bytes[2000] = {index, 0};
  int n = decoded
              ? amqp_encode_method(number, decoded, (amqp_bytes_t){.len = 1900, .bytes = bytes + 2})
              : 0;
  if (n < 0) FAIL("method %08x", (unsigned)number);
  save("method_fuzz", bytes, (size_t)n + 2);
}

static void methods(void) {
  amqp_table_entry_t can = {.key = BYTES("basic.nack"),
                            .value = {.kind = AMQP_FIELD_KIND_BOOLEAN, .value = {.boolean = 1}}};
  amqp_table_entry_t server = {.key = BYTES("capabilities"),
                               .value = {.kind = AMQP_FIELD_KIND_TABLE,
                                         .value = {.table = {.num_entries = 1, .entries = &can}}}};
  method(0, AMQP_CONNECTION_START_METHOD,
         &(amqp_connection_start_t){.version_minor = 9,
                                    .server_properties = {.num_entries = 1, .entries = &server},
                                    .mechanisms = BYTES("PLAIN AMQPLAIN"),
                                    .locales = BYTES("en_US")});
  method(1, AMQP_CONNECTION_SECURE_METHOD, &(amqp_connection_secure_t){.challenge = BYTES("?")});
  method(2, AMQP_CONNECTION_TUNE_METHOD, &(amqp_connection_tune_t){2047, 131072, 60});
  method(3, AMQP_CONNECTION_OPEN_OK_METHOD, &(amqp_connection_open_ok_t){.known_hosts = BYTES("")});
  method(4, AMQP_CONNECTION_CLOSE_METHOD,
         &(amqp_connection_close_t){320, BYTES("CONNECTION_FORCED"), 0, 0});
  method(5, 0, NULL);
  method(6, AMQP_CONNECTION_BLOCKED_METHOD, &(amqp_connection_blocked_t){BYTES("low on memory")});
  method(7, 0, NULL);
  method(8, 0, NULL);
  method(9, AMQP_CHANNEL_OPEN_OK_METHOD, &(amqp_channel_open_ok_t){BYTES("")});
  method(10, AMQP_CHANNEL_FLOW_METHOD, &(amqp_channel_flow_t){1});
  method(11, AMQP_CHANNEL_FLOW_OK_METHOD, &(amqp_channel_flow_ok_t){1});
  method(12, AMQP_CHANNEL_CLOSE_METHOD, &(amqp_channel_close_t){404, BYTES("NOT_FOUND"), 50, 10});
  for (uint8_t i = 13; i < 18; i++) method(i, 0, NULL);
  method(18, AMQP_QUEUE_DECLARE_OK_METHOD, &(amqp_queue_declare_ok_t){BYTES("queue"), 3, 1});
  method(19, 0, NULL);
  method(20, 0, NULL);
  method(21, AMQP_QUEUE_PURGE_OK_METHOD, &(amqp_queue_purge_ok_t){3});
  method(22, AMQP_QUEUE_DELETE_OK_METHOD, &(amqp_queue_delete_ok_t){3});
  method(23, 0, NULL);
  method(24, AMQP_BASIC_CONSUME_OK_METHOD, &(amqp_basic_consume_ok_t){BYTES("c")});
  method(25, AMQP_BASIC_CANCEL_METHOD, &(amqp_basic_cancel_t){BYTES("c"), 0});
  method(26, AMQP_BASIC_CANCEL_OK_METHOD, &(amqp_basic_cancel_ok_t){BYTES("c")});
  method(27, AMQP_BASIC_RETURN_METHOD,
         &(amqp_basic_return_t){312, BYTES("NO_ROUTE"), BYTES("x"), BYTES("k")});
  method(28, AMQP_BASIC_DELIVER_METHOD,
         &(amqp_basic_deliver_t){BYTES("c"), 1, 0, BYTES("x"), BYTES("k")});
  method(29, AMQP_BASIC_GET_OK_METHOD, &(amqp_basic_get_ok_t){1, 0, BYTES("x"), BYTES("k"), 7});
  method(30, AMQP_BASIC_GET_EMPTY_METHOD, &(amqp_basic_get_empty_t){BYTES("")});
  method(31, AMQP_BASIC_ACK_METHOD, &(amqp_basic_ack_t){2, 1});
  method(32, AMQP_BASIC_NACK_METHOD, &(amqp_basic_nack_t){2, 1, 0});
  for (uint8_t i = 33; i < 38; i++) method(i, 0, NULL);
}

/* ---- sessions: what engine_fuzz.c reads ---- */

/* Every frame of the script as a "frame of anything" (operation 2), then fed. */
static void session(uint8_t how, peer *p) {
  static uint8_t out[20000];
  size_t n = 0, at = 0;
  out[n++] = how;
  while (at < p->to_client.len) {
    const uint8_t *frame = p->to_client.data + at;
    size_t size = (size_t)peer_from_be(frame + 3, 4);
    if (size > 255) FAIL("a seed's frame of %zu bytes", size);
    out[n++] = 2;
    out[n++] = frame[0];
    out[n++] = frame[2];
    out[n++] = (uint8_t)size;
    memcpy(out + n, frame + 7, size);
    n += size;
    at += size + 8;
    out[n++] = at % 3 ? 4 : 5;
    if (out[n - 1] == 5) out[n++] = 7;
  }
  out[n++] = 7;
  save("engine_fuzz", out, n);
  p->to_client.len = 0;
}

static void sessions(void) {
  static const uint8_t by_user[] = {5,   192, 2,   'k', 'k', 1,   0,   3,  'a', 'b', 'c', 195, 9,
                                    195, 5,   201, 3,   0,   204, 2,   1,  207, 3,   1,   9,   8,
                                    16,  198, 0,   196, 10,  11,  196, 15, 199, 12,  7,   9,   4,
                                    7,   101, 2,   14,  'c', 4,   7,   15, 'e', 7};
  peer p = {.frame_max = 4096};
  save("engine_fuzz", by_user, sizeof by_user);
  peer_start(&p, "PLAIN");
  session(1, &p);
  peer_tune(&p, 100, 8192, 60);
  peer_send(&p, 0, CONNECTION_OPEN_OK, connection_open_ok, .known_hosts = BYTES(""));
  session(2, &p);
  peer_ack(&p, 1, 2, false);
  peer_nack(&p, 1, 3, false);
  peer_send(&p, 1, BASIC_RETURN, basic_return, .reply_code = 312, .reply_text = BYTES("NO_ROUTE"));
  {
    uint8_t props[400];
    size_t n;
    properties(props, sizeof props);
    props[0] = 0x20; /* only its headers */
    props[1] = 0;
    n = 4 + (size_t)peer_from_be(props + 18, 4);
    memmove(props + 2, props + 18, n);
    peer_header_raw(&p, 1, 3, (amqp_bytes_t){.len = n + 2, .bytes = props});
  }
  peer_body(&p, 1, "abc", 3);
  peer_ack(&p, 1, 10, true);
  session(4, &p);
  for (uint64_t tag = 13; tag < 18; tag++) peer_deliver(&p, 2, "c", tag, "body");
  peer_send(&p, 2, BASIC_CANCEL, basic_cancel, .consumer_tag = BYTES("c"));
  peer_send(&p, 2, CHANNEL_FLOW, channel_flow, .active = 0);
  peer_send(&p, 0, CONNECTION_BLOCKED, connection_blocked, .reason = BYTES("why"));
  peer_send(&p, 0, CONNECTION_UNBLOCKED, connection_unblocked, .dummy = 0);
  peer_send(&p, 2, CHANNEL_CLOSE, channel_close, .reply_code = 404,
            .reply_text = BYTES("NOT_FOUND"));
  peer_heartbeat(&p);
  peer_send(&p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 320,
            .reply_text = BYTES("FORCED"));
  session(5, &p);
  peer_send(&p, 2, BASIC_DELIVER, basic_deliver, .consumer_tag = BYTES("c"), .delivery_tag = 13);
  peer_header(&p, 2, 500, NULL);
  for (int i = 0; i < 5; i++)
    peer_body(&p, 2,
              "012345678901234567890123456789012345678901234567890123456789012345678901234567890123"
              "4567890123456789",
              100);
  session(6, &p);
  peer_send(&p, 1, CHANNEL_CLOSE, channel_close, .reply_code = 404, .reply_text = BYTES("crossed"));
  peer_send(&p, 1, CHANNEL_CLOSE_OK, channel_close_ok, .dummy = 0);
  session(7, &p);
  free(p.to_client.data);
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: seeds <directory>\n");
    return 2;
  }
  directory = argv[1];
  tables_and_properties();
  methods();
  sessions();
  return 0;
}
