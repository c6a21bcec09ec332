/* A new engine from its configuration. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

enum { DEFAULT_MAX_MESSAGE = 128 << 20, DEFAULT_MAX_BUFFER = 1 << 20, MAX_PROPERTIES = 64 };

static const double DEFAULT_ACK_DELAY = 0.001;

static bool is_mechanism(const char *name) {
  return strcmp(name, "PLAIN") == 0 || strcmp(name, "AMQPLAIN") == 0 ||
         strcmp(name, "EXTERNAL") == 0;
}

static bool has_nul(amqp_bytes_t s) { return s.len && memchr(s.bytes, 0, s.len) != NULL; }

/* NULL, or what is wrong with a configuration. */
static const char *check(const mr_config *c) {
  const char *mechanism = c->mechanism ? c->mechanism : "PLAIN";
  if (c->vhost.len > MR_SHORTSTR_MAX) return "vhost: over 255 bytes";
  if (!is_mechanism(mechanism)) return "mechanism: neither PLAIN, AMQPLAIN nor EXTERNAL";
  if (c->frame_max && c->frame_max < MR_MIN_FRAME_MAX) return "frame_max: below 4096 bytes";
  if (c->frame_max > INT32_MAX) return "frame_max: over 2 GiB";
  if (strcmp(mechanism, "PLAIN") == 0 && (has_nul(c->user) || has_nul(c->password)))
    return "user or password: a NUL byte cannot be sent with PLAIN";
  if (c->client_properties.num_entries > MAX_PROPERTIES)
    return "client_properties: over 64 entries";
  if (mr_table_depth_ok(&c->client_properties) != MR_OK)
    return "client_properties: nested too deep, or a name over 255 bytes";
  return NULL;
}

static bool copy_bytes(amqp_bytes_t *to, amqp_bytes_t from) {
  *to = mr_bytes(NULL, 0);
  if (from.len == 0) return true;
  to->bytes = malloc(from.len);
  if (!to->bytes) return false;
  memcpy(to->bytes, from.bytes, from.len);
  to->len = from.len;
  return true;
}

static amqp_table_entry_t text_entry(const char *key, const char *text) {
  amqp_table_entry_t entry = {.key = amqp_cstring_bytes(key)};
  entry.value.kind = AMQP_FIELD_KIND_UTF8;
  entry.value.value.bytes = amqp_cstring_bytes(text);
  return entry;
}

static amqp_table_entry_t true_entry(const char *key) {
  amqp_table_entry_t entry = {.key = amqp_cstring_bytes(key)};
  entry.value.kind = AMQP_FIELD_KIND_BOOLEAN;
  entry.value.value.boolean = 1;
  return entry;
}

/* Ours first, then the user's, who may replace any but the capabilities: the engine relies on
 * those. */
static int merge_properties(const amqp_table_t *users, const amqp_table_t *capabilities,
                            amqp_table_entry_t *out) {
  int n = 0;
  out[n++] = text_entry("product", "moonrabbit");
  out[n++] = text_entry("platform", "Lua");
  out[n++] = text_entry("information", "https://www.rabbitmq.com");
  out[n] = (amqp_table_entry_t){.key = amqp_cstring_bytes("capabilities")};
  out[n].value.kind = AMQP_FIELD_KIND_TABLE;
  out[n++].value.value.table = *capabilities;
  int ours = n;
  for (int i = 0; i < users->num_entries; i++) {
    int at = 0;
    while (at < ours && !mr_bytes_equal(out[at].key, users->entries[i].key)) at++;
    if (at == ours - 1) continue;
    out[at < ours ? at : n++] = users->entries[i];
  }
  return n;
}

static bool encode_properties(mr_engine *e, const amqp_table_t *users) {
  amqp_table_entry_t caps[] = {
      true_entry("publisher_confirms"),
      true_entry("exchange_exchange_bindings"),
      true_entry("basic.nack"),
      true_entry("consumer_cancel_notify"),
      true_entry("connection.blocked"),
      true_entry("consumer_priorities"),
      true_entry("authentication_failure_close"),
      true_entry("per_consumer_qos"),
  };
  amqp_table_t capabilities = {(int)(sizeof caps / sizeof *caps), caps};
  amqp_table_entry_t entries[MAX_PROPERTIES + 4];
  amqp_table_t all = {merge_properties(users, &capabilities, entries), entries};
  size_t size = mr_table_size(&all), offset = 0;
  uint8_t *p = mr_buffer_reserve(&e->client_properties, size);
  if (!p || amqp_encode_table(mr_bytes(p, size), &all, &offset) < 0) return false;
  e->client_properties.tail = offset;
  return true;
}

static void set_limits(mr_engine *e, const mr_config *c) {
  e->tuned.heartbeat = c->heartbeat;
  e->tuned.frame_max = c->frame_max ? c->frame_max : MR_DEFAULT_FRAME_MAX;
  e->tuned.channel_max = c->channel_max;
  e->max_message_size = c->max_message_size ? c->max_message_size : DEFAULT_MAX_MESSAGE;
  e->max_buffer = c->max_buffer ? c->max_buffer : DEFAULT_MAX_BUFFER;
  e->ack_delay = c->ack_delay < 0 ? DEFAULT_ACK_DELAY : c->ack_delay;
  e->ack_deadline = -1;
  e->channel_hint = 1;
}

static mr_engine *fail(mr_engine *e, mr_error *err, mr_kind kind, const char *text) {
  mr_engine_free(e);
  if (err) {
    *err = (mr_error){.kind = kind};
    mr_error_text(err, amqp_cstring_bytes(text));
  }
  return NULL;
}

mr_engine *mr_engine_new(const mr_config *c, mr_error *err) {
  const char *wrong = check(c);
  if (wrong) return fail(NULL, err, MR_KIND_PROTOCOL, wrong);
  mr_engine *e = calloc(1, sizeof *e);
  if (!e) return fail(NULL, err, MR_KIND_MEMORY, "out of memory for a connection");
  init_amqp_pool(&e->pool, 4096);
  init_amqp_pool(&e->server_pool, 4096);
  set_limits(e, c);
  snprintf(e->mechanism, sizeof e->mechanism, "%s", c->mechanism ? c->mechanism : "PLAIN");
  bool ok = copy_bytes(&e->vhost, c->vhost) && copy_bytes(&e->user, c->user) &&
            copy_bytes(&e->password, c->password) && encode_properties(e, &c->client_properties);
  return ok ? e : fail(e, err, MR_KIND_MEMORY, "out of memory for a connection");
}

void mr_engine_free(mr_engine *e) {
  if (!e) return;
  mr_detach_channels(e);
  free(e->channels);
  free(e->retired);
  mr_calls_free(&e->calls);
  free(e->vhost.bytes);
  free(e->user.bytes);
  if (e->password.bytes) mr_wipe(e->password.bytes, e->password.len);
  free(e->password.bytes);
  mr_buffer_free(&e->client_properties);
  mr_buffer_free(&e->rx);
  mr_buffer_free(&e->tx);
  empty_amqp_pool(&e->pool);
  empty_amqp_pool(&e->server_pool);
  free(e);
}
