/* The handshake: what is sent byte for byte, what is negotiated, every way it can fail. */
#include "peer.h"

/* Up to the client's start-ok. */
static peer *started(mr_config *config, const char *mechanisms) {
  peer *p = peer_new(config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  peer_expect_protocol(p);
  peer_start(p, mechanisms);
  return p;
}

static amqp_connection_start_ok_t *start_ok(mr_config *config, const char *mechanisms, peer **p) {
  *p = started(config, mechanisms);
  expect_no_event(*p);
  return expect(*p, 0, CONNECTION_START_OK, connection_start_ok);
}

static void nothing_is_sent_before_start(void) {
  mr_config config = peer_config();
  peer *p = peer_new(&config);
  expect_nothing(p);
  CHECK(!mr_engine_is_open(p->engine));
  CHECK(mr_engine_deadline(p->engine, p->now) < 0);
  peer_free(p);
}

static void plain_is_sent_byte_for_byte(void) {
  mr_config config = peer_config();
  amqp_connection_start_ok_t *ok;
  peer *p;
  ok = start_ok(&config, "AMQPLAIN PLAIN", &p);
  CHECK_TEXT(ok->mechanism, "PLAIN");
  CHECK_TEXT(ok->locale, "en_US");
  CHECK_BYTES(ok->response.bytes, ok->response.len, "\0guest\0secret", 13);
  peer_free(p);
}

static void plain_takes_any_bytes(void) {
  mr_config config = peer_config();
  amqp_connection_start_ok_t *ok;
  peer *p;
  config.user = BYTES("us\xC3\xA9r");
  config.password = (amqp_bytes_t){.len = 3, .bytes = (void *)(uintptr_t) "a b"};
  config.mechanism = "PLAIN";
  ok = start_ok(&config, "PLAIN", &p);
  CHECK_BYTES(ok->response.bytes, ok->response.len, "\0us\xC3\xA9r\0a b", 10);
  peer_free(p);
}

static void an_empty_password_is_sent(void) {
  mr_config config = peer_config();
  amqp_connection_start_ok_t *ok;
  peer *p;
  config.password = (amqp_bytes_t){.len = 0, .bytes = NULL};
  ok = start_ok(&config, "PLAIN", &p);
  CHECK_BYTES(ok->response.bytes, ok->response.len, "\0guest\0", 7);
  peer_free(p);
}

static void amqplain_is_sent_byte_for_byte(void) {
  static const char want[] = "\5LOGINS\0\0\0\5guest\10PASSWORDS\0\0\0\6secret";
  mr_config config = peer_config();
  amqp_connection_start_ok_t *ok;
  peer *p;
  config.mechanism = "AMQPLAIN";
  ok = start_ok(&config, "PLAIN AMQPLAIN", &p);
  CHECK_TEXT(ok->mechanism, "AMQPLAIN");
  CHECK_BYTES(ok->response.bytes, ok->response.len, want, sizeof want - 1);
  peer_free(p);
}

static void external_is_sent_without_credentials(void) {
  mr_config config = peer_config();
  amqp_connection_start_ok_t *ok;
  peer *p;
  config.mechanism = "EXTERNAL";
  ok = start_ok(&config, "PLAIN EXTERNAL", &p);
  CHECK_TEXT(ok->mechanism, "EXTERNAL");
  CHECK_EQ(ok->response.len, 0);
  peer_free(p);
}

static const amqp_field_value_t *find(const amqp_table_t *table, const char *key) {
  for (int i = 0; i < table->num_entries; i++)
    if (table->entries[i].key.len == strlen(key) &&
        memcmp(table->entries[i].key.bytes, key, strlen(key)) == 0)
      return &table->entries[i].value;
  return NULL;
}

static void the_clients_properties_are_told(void) {
  static const char *const capabilities[] = {"publisher_confirms",  "exchange_exchange_bindings",
                                             "basic.nack",          "consumer_cancel_notify",
                                             "connection.blocked",  "authentication_failure_close",
                                             "consumer_priorities", "per_consumer_qos"};
  amqp_table_entry_t own[] = {
      {.key = BYTES("capabilities"),
       .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("none: but ours stay")}}},
      {.key = BYTES("connection_name"),
       .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("me")}}},
      {.key = BYTES("product"),
       .value = {.kind = AMQP_FIELD_KIND_UTF8, .value = {.bytes = BYTES("theirs")}}}};
  mr_config config = peer_config();
  amqp_connection_start_ok_t *ok;
  const amqp_field_value_t *value;
  int products = 0;
  peer *p;
  config.client_properties = (amqp_table_t){.num_entries = 3, .entries = own};
  ok = start_ok(&config, "PLAIN", &p);
  value = find(&ok->client_properties, "capabilities");
  CHECK(value && value->kind == AMQP_FIELD_KIND_TABLE);
  for (size_t i = 0; i < sizeof capabilities / sizeof *capabilities; i++) {
    const amqp_field_value_t *can = find(&value->value.table, capabilities[i]);
    if (!can || can->kind != AMQP_FIELD_KIND_BOOLEAN || !can->value.boolean)
      FAIL("no capability %s", capabilities[i]);
  }
  value = find(&ok->client_properties, "connection_name");
  CHECK(value);
  CHECK_TEXT(value->value.bytes, "me");
  value = find(&ok->client_properties, "product");
  CHECK(value);
  CHECK_TEXT(value->value.bytes, "theirs");
  for (int i = 0; i < ok->client_properties.num_entries; i++)
    products += ok->client_properties.entries[i].key.len == 7 &&
                memcmp(ok->client_properties.entries[i].key.bytes, "product", 7) == 0;
  CHECK_EQ(products, 1);
  peer_free(p);
}

static void a_config_that_cannot_be_is_refused(void) {
  static amqp_table_entry_t many[65], circle;
  char text[300];
  mr_config config;
  mr_error err;
  for (int i = 0; i < 65; i++)
    many[i] = (amqp_table_entry_t){.key = BYTES("k"), .value = {.kind = AMQP_FIELD_KIND_VOID}};
  circle.value.kind = AMQP_FIELD_KIND_TABLE;
  circle.value.value.table = (amqp_table_t){.num_entries = 1, .entries = &circle};
  memset(text, 'v', sizeof text);
#define REFUSED(change)                             \
  do {                                              \
    mr_engine *engine;                              \
    config = peer_config();                         \
    memset(&err, 0, sizeof err);                    \
    change;                                         \
    engine = mr_engine_new(&config, &err);          \
    if (engine) FAIL("accepted: %s", #change);      \
    if (!err.text[0]) FAIL("no text: %s", #change); \
  } while (0)
  REFUSED(config.mechanism = "DIGEST-MD5");
  REFUSED(config.mechanism = "");
  REFUSED(config.frame_max = 1024);
  REFUSED(config.frame_max = 4095);
  REFUSED(config.frame_max = 0x80000000u);
  REFUSED(config.user = ((amqp_bytes_t){.len = 3, .bytes = (void *)(uintptr_t) "a\0b"}));
  REFUSED(config.password = ((amqp_bytes_t){.len = 3, .bytes = (void *)(uintptr_t) "a\0b"}));
  REFUSED(config.client_properties = ((amqp_table_t){.num_entries = 65, .entries = many}));
  REFUSED(config.client_properties = ((amqp_table_t){.num_entries = 1, .entries = &circle}));
  REFUSED((config.vhost.len = 256, config.vhost.bytes = text));
#undef REFUSED
  config = peer_config();
  config.frame_max = 4096;
  config.vhost = (amqp_bytes_t){.len = 255, .bytes = text};
  peer_free(peer_open_with(&config));
}

/* ---- tuning ---- */

static mr_tuned tuned(mr_tuned ours, mr_tuned theirs) {
  mr_config config = peer_config();
  amqp_connection_tune_ok_t *ok;
  mr_tuned result;
  peer *p;
  config.channel_max = ours.channel_max;
  config.frame_max = ours.frame_max;
  config.heartbeat = ours.heartbeat;
  p = started(&config, "PLAIN");
  expect_no_event(p);
  peer_discard(p);
  peer_tune(p, theirs.channel_max, theirs.frame_max, theirs.heartbeat);
  expect_no_event(p);
  ok = expect(p, 0, CONNECTION_TUNE_OK, connection_tune_ok);
  result = mr_engine_tuned(p->engine);
  CHECK_EQ(ok->channel_max, result.channel_max);
  CHECK_EQ(ok->frame_max, result.frame_max);
  CHECK_EQ(ok->heartbeat, result.heartbeat);
  CHECK_TEXT(expect(p, 0, CONNECTION_OPEN, connection_open)->virtual_host, "/");
  peer_send(p, 0, CONNECTION_OPEN_OK, connection_open_ok, .known_hosts = BYTES(""));
  expect_event(p, MR_EV_OPEN);
  CHECK_EQ(mr_engine_tuned(p->engine).channel_max, result.channel_max);
  peer_free(p);
  return result;
}

static void tuning_takes_the_smaller_wish(void) {
  mr_tuned t = tuned((mr_tuned){10, 8192, 30}, (mr_tuned){2047, 131072, 60});
  CHECK_EQ(t.channel_max, 10);
  CHECK_EQ(t.frame_max, 8192);
  CHECK_EQ(t.heartbeat, 30);
  t = tuned((mr_tuned){3000, 1 << 20, 90}, (mr_tuned){2047, 131072, 60});
  CHECK_EQ(t.channel_max, 2047);
  CHECK_EQ(t.frame_max, 131072);
  CHECK_EQ(t.heartbeat, 60);
}

static void tuning_without_wishes_takes_the_brokers(void) {
  mr_tuned t = tuned((mr_tuned){0, 0, 60}, (mr_tuned){7, 4096, 61});
  CHECK_EQ(t.channel_max, 7);
  CHECK_EQ(t.frame_max, 4096);
  CHECK_EQ(t.heartbeat, 60);
}

static void tuning_with_a_broker_without_limits(void) {
  mr_tuned t = tuned((mr_tuned){100, 16384, 20}, (mr_tuned){0, 0, 0});
  CHECK_EQ(t.channel_max, 100);
  CHECK_EQ(t.frame_max, 16384);
  t = tuned((mr_tuned){0, 0, 0}, (mr_tuned){0, 0, 0});
  CHECK(t.channel_max == 0 || t.channel_max == 65535); /* in tune-ok a zero means the same */
  CHECK(t.frame_max >= 4096);
  CHECK_EQ(t.heartbeat, 0);
}

static void a_frame_max_below_the_minimum_is_a_protocol_error(void) {
  mr_config config = peer_config();
  peer *p = started(&config, "PLAIN");
  peer_tune(p, 10, 1024, 0);
  expect_closed(p, MR_KIND_PROTOCOL);
  peer_free(p);
}

static void a_server_of_version_4_1_with_8192(void) {
  mr_tuned t = tuned((mr_tuned){0, 0, 60}, (mr_tuned){2047, 8192, 60});
  CHECK_EQ(t.frame_max, 8192);
}

/* ---- failures ---- */

static void an_unsupported_mechanism_is_an_auth_error(void) {
  mr_config config = peer_config();
  peer *p = started(&config, "AMQPLAIN EXTERNAL XPLAIN PLAINX");
  mr_error *error = expect_closed(p, MR_KIND_AUTH);
  CHECK(strstr(error->text, "PLAIN"));
  peer_free(p);
}

static void a_version_mismatch_names_the_version(void) {
  mr_config config = peer_config();
  mr_error *error;
  peer *p = peer_new(&config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  peer_bytes(&p->to_client, "AMQP\0\1\0\0", 8);
  error = expect_closed(p, MR_KIND_PROTOCOL);
  CHECK(strstr(error->text, "1"));
  CHECK(strstr(error->text, "0"));
  peer_free(p);
  p = peer_new(&config);
  p->split = PEER_BYTES;
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  peer_bytes(&p->to_client, "AMQP\0\0\x09\x01", 8);
  expect_closed(p, MR_KIND_PROTOCOL);
  peer_free(p);
}

static void a_start_of_another_version_is_refused(void) {
  mr_config config = peer_config();
  peer *p = peer_new(&config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  peer_send(p, 0, CONNECTION_START, connection_start, .version_major = 1, .version_minor = 0,
            .mechanisms = BYTES("PLAIN"), .locales = BYTES("en_US"));
  expect_closed(p, MR_KIND_PROTOCOL);
  peer_free(p);
}

static void other_protocols_are_named(void) {
  static const struct {
    const char *text, *name;
  } answers[] = {{"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "HTTP"},
                 {"\x15\x03\x01\0\2\2\x16", NULL}, /* a TLS alert */
                 {"SSH-2.0-OpenSSH_9.2\r\n", NULL},
                 {"220 mail.example ESMTP\r\n", NULL},
                 {"-ERR unknown command 'AMQP'\r\n", NULL}};
  for (size_t i = 0; i < sizeof answers / sizeof *answers; i++)
    for (int split = PEER_WHOLE; split <= PEER_BYTES; split++) {
      mr_config config = peer_config();
      peer *p = peer_new(&config);
      size_t n = strlen(answers[i].text);
      mr_error *error;
      if (i == 1) n = 7;
      p->split = (peer_split)split;
      CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
      peer_bytes(&p->to_client, answers[i].text, n);
      error = expect_closed(p, MR_KIND_PROTOCOL);
      if (answers[i].name && !strstr(error->text, answers[i].name))
        FAIL("'%s' does not name it", error->text);
      for (const char *c = error->text; *c; c++)
        if ((unsigned char)*c < ' ' || (unsigned char)*c > '~') FAIL("byte %d in the text", *c);
      peer_free(p);
    }
}

static void a_wrong_password_is_an_auth_error(void) {
  mr_config config = peer_config();
  mr_error *error;
  peer *p = started(&config, "PLAIN");
  expect_no_event(p);
  peer_discard(p);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 403,
            .reply_text =
                BYTES("ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN."));
  error = expect_closed(p, MR_KIND_AUTH);
  CHECK_EQ(error->code, 403);
  CHECK(strstr(error->text, "ACCESS_REFUSED"));
  CHECK(!strstr(error->text, "secret"));
  expect(p, 0, CONNECTION_CLOSE_OK, connection_close_ok);
  expect_nothing(p);
  peer_free(p);
}

/* Brokers without authentication_failure_close just hang up. */
static void a_hang_up_after_start_ok_is_an_auth_error(void) {
  mr_config config = peer_config();
  peer *p = started(&config, "PLAIN");
  expect_no_event(p);
  peer_discard(p);
  mr_engine_eof(p->engine, "end of file");
  expect_closed(p, MR_KIND_AUTH);
  peer_free(p);
}

static void a_hang_up_before_start_is_closed(void) {
  mr_config config = peer_config();
  mr_error *error;
  peer *p = peer_new(&config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  mr_engine_eof(p->engine, "reset by peer");
  error = expect_closed(p, MR_KIND_CLOSED);
  CHECK(strstr(error->text, "reset by peer"));
  peer_free(p);
  p = peer_new(&config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  mr_engine_eof(p->engine, NULL);
  expect_closed(p, MR_KIND_CLOSED);
  peer_free(p);
}

static peer *opening(mr_config *config) {
  peer *p = started(config, "PLAIN");
  peer_tune(p, 2047, 131072, 60);
  expect_no_event(p);
  peer_discard(p);
  return p;
}

static void an_unknown_vhost_is_a_vhost_error(void) {
  mr_config config = peer_config();
  mr_error *error;
  peer *p;
  config.vhost = BYTES("nowhere");
  p = opening(&config);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 530,
            .reply_text = BYTES("NOT_ALLOWED - vhost nowhere not found"), .class_id = 10,
            .method_id = 40);
  error = expect_closed(p, MR_KIND_VHOST);
  CHECK_EQ(error->code, 530);
  CHECK_EQ(error->class_id, 10);
  CHECK_EQ(error->method_id, 40);
  CHECK(strstr(error->text, "nowhere"));
  expect(p, 0, CONNECTION_CLOSE_OK, connection_close_ok);
  peer_free(p);
}

static void a_vhost_without_permission_is_a_vhost_error(void) {
  mr_config config = peer_config();
  peer *p = opening(&config);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 530,
            .reply_text = BYTES("NOT_ALLOWED - access to vhost '/' refused for user 'guest'"),
            .class_id = 10, .method_id = 40);
  expect_closed(p, MR_KIND_VHOST);
  peer_free(p);
}

static void other_closes_of_the_handshake(void) {
  mr_config config = peer_config();
  peer *p = opening(&config);
  peer_send(p, 0, CONNECTION_CLOSE, connection_close, .reply_code = 541,
            .reply_text = BYTES("INTERNAL_ERROR"));
  CHECK_EQ(expect_closed(p, MR_KIND_CLOSED)->code, 541);
  peer_free(p);
  p = started(&config, "PLAIN");
  expect_no_event(p);
  peer_send(p, 0, CONNECTION_SECURE, connection_secure, .challenge = BYTES("and?"));
  CHECK(strstr(expect_closed(p, MR_KIND_AUTH)->text, "PLAIN"));
  peer_free(p);
}

static void the_wrong_frame_in_the_handshake_is_a_protocol_error(void) {
  for (int step = 0; step < 3; step++)
    for (int what = 0; what < 5; what++) {
      mr_config config = peer_config();
      peer *p = peer_new(&config);
      CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
      if (step > 0) peer_start(p, "PLAIN");
      if (step > 1) peer_tune(p, 0, 0, 0);
      expect_no_event(p);
      switch (what) {
        case 0: peer_send(p, 0, CONNECTION_CLOSE_OK, connection_close_ok, .dummy = 0); break;
        case 1: peer_send(p, 1, CHANNEL_OPEN_OK, channel_open_ok, .channel_id = BYTES("")); break;
        case 2: peer_header(p, 1, 5, NULL); break;
        case 3:
          peer_send(p, 1, CONNECTION_START, connection_start, .version_minor = 9);
          break; /* on channel 1 */
        case 4:
          if (step == 1)
            peer_start(p, "PLAIN");
          else
            peer_tune(p, 0, 0, 0);
          break;
      }
      expect_closed(p, MR_KIND_PROTOCOL);
      peer_free(p);
    }
}

static void commands_before_open_are_refused(void) {
  mr_config config = peer_config();
  mr_channel *channel = NULL;
  peer *p = started(&config, "PLAIN");
  CHECK_EQ(mr_channel_open(p->engine, &channel), MR_CLOSED);
  CHECK_EQ(mr_engine_update_secret(p->engine, BYTES("a"), BYTES("b")), MR_CLOSED);
  peer_free(p);
}

static void a_close_during_the_handshake_ends_it(void) {
  for (int step = 0; step < 3; step++) {
    mr_config config = peer_config();
    peer *p = peer_new(&config);
    CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
    if (step > 0) peer_start(p, "PLAIN");
    if (step > 1) peer_tune(p, 0, 0, 0);
    expect_no_event(p);
    peer_discard(p);
    mr_engine_close(p->engine, 200, "bye");
    peer_pull(p);
    if (peer_next(p) != MR_EV_CLOSED) { /* it may still wait for the broker's answer */
      peer_send(p, 0, CONNECTION_CLOSE_OK, connection_close_ok, .dummy = 0);
      if (peer_next(p) != MR_EV_CLOSED) {
        mr_engine_eof(p->engine, NULL);
        expect_event(p, MR_EV_CLOSED);
      }
    }
    CHECK(!mr_engine_is_open(p->engine));
    peer_free(p);
  }
}

static void the_servers_properties_are_kept(void) {
  peer *p = peer_open();
  const amqp_table_t *table;
  const amqp_field_value_t *product;
  peer_heartbeat(p);
  expect_no_event(p);
  table = mr_engine_server_properties(p->engine);
  CHECK(table);
  product = find(table, "product");
  CHECK(product);
  CHECK_TEXT(product->value.bytes, "peer");
  peer_free(p);
}

/* ---- the password ---- */

/* How often the heap holds `needle`. */
static int copies(const char *needle, size_t n) {
  FILE *maps = fopen("/proc/self/maps", "r");
  char line[512];
  int found = 0;
  if (!maps) return 0;
  while (fgets(line, sizeof line, maps)) {
    uintptr_t from, to;
    if (!strstr(line, "[heap]") || sscanf(line, "%" SCNxPTR "-%" SCNxPTR, &from, &to) != 2)
      continue;
    for (const char *at = (const char *)from;
         (at = memmem(at, (size_t)((const char *)to - at), needle, n)); at++)
      found++;
  }
  fclose(maps);
  return found;
}

static void skip_where_the_heap_cannot_be_read(void) {
#if defined(__SANITIZE_ADDRESS__)
  check_skip("AddressSanitizer poisons the heap");
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
  check_skip("AddressSanitizer poisons the heap");
#endif
#endif
  static const char needle[] = "a needle in the heap";
  char *block = malloc(sizeof needle);
  bool seen;
  if (!block) abort();
  memcpy(block, needle, sizeof needle);
  __asm__ volatile("" : : "r"(block) : "memory"); /* the compiler must not forget the copy */
  seen = copies(needle, sizeof needle) > 0;
  memset(block, 0, sizeof needle);
  free(block);
  if (!seen) check_skip("the heap cannot be read here");
}

static void the_password_is_wiped_once_sent(void) {
  skip_where_the_heap_cannot_be_read();
  static char password[] = "hunter2-correct-horse";
  for (int kind = 0; kind < 2; kind++) {
    mr_config config = peer_config();
    peer *p;
    config.password = BYTES(password);
    config.mechanism = kind ? "AMQPLAIN" : "PLAIN";
    p = started(&config, "PLAIN AMQPLAIN");
    expect_no_event(p);
    CHECK(copies(password, sizeof password - 1) > 0);
    peer_pull(p);
    memset(p->from_client.data, 0, p->from_client.capacity);
    CHECK_EQ(copies(password, sizeof password - 1), 0);
    p->from_client.len = 0;
    peer_tune(p, 0, 0, 0);
    peer_send(p, 0, CONNECTION_OPEN_OK, connection_open_ok, .known_hosts = BYTES(""));
    expect_event(p, MR_EV_OPEN);
    CHECK_EQ(mr_engine_update_secret(p->engine, BYTES(password), BYTES("renewed")) < 0, 0);
    peer_pull(p);
    memset(p->from_client.data, 0, p->from_client.capacity);
    CHECK_EQ(copies(password, sizeof password - 1), 0);
    peer_free(p);
    CHECK_EQ(copies(password, sizeof password - 1), 0);
  }
}

/* Neither a write that takes a part nor output that is added behind it leaves a copy. */
static void a_secret_leaves_no_copy_in_a_busy_buffer(void) {
  skip_where_the_heap_cannot_be_read();
  static char secret[] = "renewed-token-0123456789";
  peer *p = peer_open();
  mr_channel *channel = peer_channel(p);
  static char body[5000];
  for (int i = 0; i < 60; i++) {
    size_t n = 0;
    CHECK(peer_publish(channel, false, "before", NULL) >= 0);
    CHECK(mr_engine_update_secret(p->engine, BYTES(secret), BYTES("renewed")) >= 0);
    CHECK(mr_engine_tx_peek(p->engine, &n));
    mr_engine_tx_consume(p->engine, 1 + check_below((uint32_t)n - 1), p->now);
    for (int k = 0; k < i; k++)
      CHECK(mr_publish(channel, &(mr_publish_args){.body = {.len = sizeof body, .bytes = body}},
                       NULL) >= 0);
    while (mr_engine_tx_peek(p->engine, &n))
      mr_engine_tx_consume(p->engine, 1 + check_below((uint32_t)n), p->now);
    CHECK_EQ(copies(secret + 8, sizeof secret - 9), 0);
  }
  mr_channel_release(channel);
  peer_free(p);
}

static void the_password_is_wiped_when_never_sent(void) {
  skip_where_the_heap_cannot_be_read();
  static char password[] = "never-sent-password";
  mr_config config = peer_config();
  peer *p;
  config.password = BYTES(password);
  p = peer_new(&config);
  CHECK_EQ(mr_engine_start(p->engine, p->now), MR_OK);
  CHECK(copies(password, sizeof password - 1) > 0);
  peer_free(p);
  CHECK_EQ(copies(password, sizeof password - 1), 0);
}

int main(int argc, char **argv) {
  check_start(argc, argv);
  RUN(nothing_is_sent_before_start);
  RUN(plain_is_sent_byte_for_byte);
  RUN(plain_takes_any_bytes);
  RUN(an_empty_password_is_sent);
  RUN(amqplain_is_sent_byte_for_byte);
  RUN(external_is_sent_without_credentials);
  RUN(the_clients_properties_are_told);
  RUN(a_config_that_cannot_be_is_refused);
  RUN(tuning_takes_the_smaller_wish);
  RUN(tuning_without_wishes_takes_the_brokers);
  RUN(tuning_with_a_broker_without_limits);
  RUN(a_frame_max_below_the_minimum_is_a_protocol_error);
  RUN(a_server_of_version_4_1_with_8192);
  RUN(an_unsupported_mechanism_is_an_auth_error);
  RUN(a_version_mismatch_names_the_version);
  RUN(a_start_of_another_version_is_refused);
  RUN(other_protocols_are_named);
  RUN(a_wrong_password_is_an_auth_error);
  RUN(a_hang_up_after_start_ok_is_an_auth_error);
  RUN(a_hang_up_before_start_is_closed);
  RUN(an_unknown_vhost_is_a_vhost_error);
  RUN(a_vhost_without_permission_is_a_vhost_error);
  RUN(other_closes_of_the_handshake);
  RUN(the_wrong_frame_in_the_handshake_is_a_protocol_error);
  RUN(commands_before_open_are_refused);
  RUN(a_close_during_the_handshake_ends_it);
  RUN(the_servers_properties_are_kept);
  RUN(the_password_is_wiped_once_sent);
  RUN(a_secret_leaves_no_copy_in_a_busy_buffer);
  RUN(the_password_is_wiped_when_never_sent);
  return check_end();
}
