/* Channel 0: the handshake, and the methods of the open connection. */
#include <stdlib.h>
#include <string.h>

#include "core/engine.h"

static const char LOCALE[] = "en_US";

/* ---- the first bytes ---- */

bool mr_greeting_ok(mr_engine *e) {
  size_t n = mr_buffer_size(&e->rx);
  if (n == 0) return true;
  const uint8_t *p = e->rx.data + e->rx.head;
  if (p[0] == AMQP_FRAME_METHOD) return true;
  if (n >= 8 && memcmp(p, "AMQP", 4) == 0)
    mr_end(e, MR_KIND_PROTOCOL, 0,
           "the broker speaks another protocol: it answered AMQP %u-%u-%u-%u", p[4], p[5], p[6],
           p[7]);
  else if (n >= 4 && memcmp(p, "HTTP", 4) == 0)
    mr_end(e, MR_KIND_PROTOCOL, 0, "the port speaks HTTP, not AMQP");
  else if (n >= 2 && p[0] == 0x15 && p[1] == 0x03)
    mr_end(e, MR_KIND_PROTOCOL, 0, "the port speaks TLS: use amqps");
  else if (n >= 8)
    mr_end(e, MR_KIND_PROTOCOL, 0, "the port does not speak AMQP (its first byte is 0x%02x)", p[0]);
  return false;
}

/* ---- Start ---- */

static bool is_offered(amqp_bytes_t mechanisms, const char *wanted) {
  const char *p = mechanisms.bytes;
  const char *end = p + mechanisms.len;
  size_t len = strlen(wanted);
  while (p < end) {
    const char *space = memchr(p, ' ', (size_t)(end - p));
    const char *stop = space ? space : end;
    if ((size_t)(stop - p) == len && memcmp(p, wanted, len) == 0) return true;
    p = stop + 1;
  }
  return false;
}

static const amqp_field_value_t *look_up(const amqp_table_t *table, const char *key) {
  amqp_bytes_t wanted = amqp_cstring_bytes(key);
  for (int i = 0; i < table->num_entries; i++)
    if (mr_bytes_equal(table->entries[i].key, wanted)) return &table->entries[i].value;
  return NULL;
}

static bool has_capability(const amqp_table_t *properties, const char *name) {
  const amqp_field_value_t *value = look_up(properties, "capabilities");
  if (!value || value->kind != AMQP_FIELD_KIND_TABLE) return false;
  value = look_up(&value->value.table, name);
  return value && value->kind == AMQP_FIELD_KIND_BOOLEAN && value->value.boolean;
}

static size_t response_size(const mr_engine *e) {
  size_t both = e->user.len + e->password.len;
  if (strcmp(e->mechanism, "PLAIN") == 0) return both + 2;
  if (strcmp(e->mechanism, "AMQPLAIN") == 0) return both + 6 + 5 + 9 + 5;
  return 0;
}

static uint8_t *put_response(const mr_engine *e, uint8_t *p) {
  if (strcmp(e->mechanism, "PLAIN") == 0) {
    p = mr_put_bytes(mr_put8(p, 0), e->user.bytes, e->user.len);
    return mr_put_bytes(mr_put8(p, 0), e->password.bytes, e->password.len);
  }
  if (strcmp(e->mechanism, "AMQPLAIN") == 0) {
    p = mr_put8(mr_put_shortstr(p, amqp_cstring_bytes("LOGIN")), AMQP_FIELD_KIND_UTF8);
    p = mr_put_longstr(p, e->user);
    p = mr_put8(mr_put_shortstr(p, amqp_cstring_bytes("PASSWORD")), AMQP_FIELD_KIND_UTF8);
    return mr_put_longstr(p, e->password);
  }
  return p;
}

static void forget_password(mr_engine *e) {
  if (e->password.bytes) mr_wipe(e->password.bytes, e->password.len);
  free(e->password.bytes);
  e->password = mr_bytes(NULL, 0);
}

static mr_status send_start_ok(mr_engine *e) {
  amqp_bytes_t mechanism = amqp_cstring_bytes(e->mechanism);
  amqp_bytes_t locale = amqp_cstring_bytes(LOCALE);
  size_t table = mr_buffer_size(&e->client_properties);
  size_t response = response_size(e);
  size_t payload = 4 + table + 1 + mechanism.len + 4 + response + 1 + locale.len;
  uint8_t *p = mr_buffer_reserve(&e->tx, payload + MR_FRAME_OVERHEAD);
  if (!p) return MR_NO_MEMORY;
  p = mr_put_frame_header(p, AMQP_FRAME_METHOD, 0, (uint32_t)payload);
  p = mr_put32(p, AMQP_CONNECTION_START_OK_METHOD);
  p = mr_put_bytes(p, e->client_properties.data, table);
  p = mr_put_shortstr(p, mechanism);
  p = put_response(e, mr_put32(p, (uint32_t)response));
  p = mr_put_shortstr(p, locale);
  mr_put8(p, MR_FRAME_END);
  e->tx.tail += payload + MR_FRAME_OVERHEAD;
  e->tx.secret = true;
  forget_password(e);
  return MR_OK;
}

static void out_of_memory(mr_engine *e) {
  mr_end(e, MR_KIND_MEMORY, 0, "out of memory during the handshake");
}

static void on_start(mr_engine *e, amqp_bytes_t args) {
  /* What is decoded points into what it was decoded from, and these properties are kept. */
  amqp_bytes_t kept;
  amqp_pool_alloc_bytes(&e->server_pool, args.len, &kept);
  if (!kept.bytes) {
    out_of_memory(e);
    return;
  }
  memcpy(kept.bytes, args.bytes, args.len);
  amqp_connection_start_t *start =
      mr_decode_method(e, &e->server_pool, AMQP_CONNECTION_START_METHOD, kept);
  if (!start) return;
  e->server_properties = start->server_properties;
  e->close_reports_auth = has_capability(&e->server_properties, "authentication_failure_close");
  if (start->version_major != 0 || start->version_minor != 9) {
    mr_end(e, MR_KIND_PROTOCOL, 0, "the broker speaks AMQP %u-%u, not 0-9-1", start->version_major,
           start->version_minor);
    return;
  }
  if (!is_offered(start->mechanisms, e->mechanism)) {
    mr_error offered;
    mr_error_text(&offered, start->mechanisms);
    mr_end(e, MR_KIND_AUTH, 0, "the broker does not offer %s but: %.200s", e->mechanism,
           offered.text);
    return;
  }
  if (send_start_ok(e) != MR_OK) {
    out_of_memory(e);
    return;
  }
  e->state = MR_WAIT_TUNE;
}

/* ---- Tune and Open ---- */

/* In Tune a zero means "no limit". */
static uint32_t smaller(uint32_t ours, uint32_t theirs) {
  if (ours == 0 || theirs == 0) return ours + theirs;
  return ours < theirs ? ours : theirs;
}

static void on_tune(mr_engine *e, amqp_bytes_t args) {
  const uint8_t *p = args.bytes;
  uint32_t frame_max = mr_get32(p + 2);
  if (frame_max && frame_max < MR_MIN_FRAME_MAX) {
    mr_end(e, MR_KIND_PROTOCOL, 0,
           "the broker wants frames of at most %u bytes, less than AMQP's 4096", frame_max);
    return;
  }
  e->tuned.channel_max = (uint16_t)smaller(e->tuned.channel_max, mr_get16(p));
  e->tuned.frame_max = smaller(e->tuned.frame_max, frame_max);
  if (e->tuned.heartbeat)
    e->tuned.heartbeat = (uint16_t)smaller(e->tuned.heartbeat, mr_get16(p + 6));
  amqp_connection_tune_ok_t ok = {e->tuned.channel_max, e->tuned.frame_max, e->tuned.heartbeat};
  amqp_connection_open_t open = {.virtual_host = e->vhost};
  if (mr_send_method(e, 0, AMQP_CONNECTION_TUNE_OK_METHOD, &ok) != MR_OK ||
      mr_send_method(e, 0, AMQP_CONNECTION_OPEN_METHOD, &open) != MR_OK) {
    out_of_memory(e);
    return;
  }
  e->next_heartbeat = e->last_rx + e->tuned.heartbeat / 2.0;
  e->state = MR_WAIT_OPEN;
}

/* ---- Close ---- */

static mr_kind kind_of_close(const mr_engine *e, uint16_t code) {
  switch (e->state) {
    case MR_WAIT_START:
    case MR_WAIT_TUNE: return code == AMQP_ACCESS_REFUSED ? MR_KIND_AUTH : MR_KIND_PROTOCOL;
    case MR_WAIT_OPEN:
      return code == AMQP_NOT_ALLOWED || code == AMQP_ACCESS_REFUSED || code == AMQP_INVALID_PATH
                 ? MR_KIND_VHOST
                 : MR_KIND_CLOSED;
    default: break;
  }
  bool ours = code > 500 && code != AMQP_INTERNAL_ERROR && code != AMQP_RESOURCE_ERROR;
  return ours ? MR_KIND_PROTOCOL : MR_KIND_CLOSED;
}

static void on_close(mr_engine *e, amqp_bytes_t args) {
  mr_reader r = mr_reader_of(args, true);
  uint16_t code = mr_read16(&r);
  mr_error said;
  mr_error_text(&said, mr_read_shortstr(&r));
  mr_kind kind = kind_of_close(e, code);
  amqp_connection_close_ok_t ok = {0};
  mr_send_method(e, 0, AMQP_CONNECTION_CLOSE_OK_METHOD, &ok); /* without it the broker times out */
  if (said.text[0])
    mr_end(e, kind, code, "%s", said.text);
  else
    mr_end(e, kind, code, "the broker closed the connection with code %u", code);
  e->error.class_id = mr_read16(&r);
  e->error.method_id = mr_read16(&r);
}

/* ---- the open connection ---- */

static bool on_blocked(mr_engine *e, amqp_bytes_t args, mr_event *event) {
  mr_reader r = mr_reader_of(args, true);
  e->blocked |= MR_BY_BROKER;
  event->type = MR_EV_BLOCKED;
  event->text = mr_read_shortstr(&r);
  return true;
}

static bool on_unblocked(mr_engine *e, mr_event *event) {
  e->blocked &= (uint8_t)~MR_BY_BROKER;
  event->type = MR_EV_UNBLOCKED;
  return true;
}

static bool on_secret_ok(mr_engine *e, mr_event *event) {
  mr_call_entry call;
  if (!mr_calls_take(&e->calls, MR_CONNECTION_UPDATE_SECRET_OK, &call)) {
    mr_protocol_error(e, AMQP_COMMAND_INVALID, "update-secret-ok answers nothing that was asked");
    return false;
  }
  event->type = MR_EV_REPLY;
  event->method.id = MR_CONNECTION_UPDATE_SECRET_OK;
  event->method.decoded = NULL;
  return true;
}

static bool on_open_ok(mr_engine *e, mr_event *event) {
  e->state = MR_OPEN;
  event->type = MR_EV_OPEN;
  return true;
}

/* The state in which a method of channel 0 may come; any open one where it says MR_OPEN. */
static bool is_expected(const mr_engine *e, amqp_method_number_t method) {
  switch (method) {
    case AMQP_CONNECTION_START_METHOD: return e->state == MR_WAIT_START;
    case AMQP_CONNECTION_SECURE_METHOD:
    case AMQP_CONNECTION_TUNE_METHOD: return e->state == MR_WAIT_TUNE;
    case AMQP_CONNECTION_OPEN_OK_METHOD: return e->state == MR_WAIT_OPEN;
    case AMQP_CONNECTION_CLOSE_METHOD: return e->state >= MR_WAIT_START;
    case AMQP_CONNECTION_CLOSE_OK_METHOD: return e->state == MR_CLOSING;
    case AMQP_CONNECTION_BLOCKED_METHOD:
    case AMQP_CONNECTION_UNBLOCKED_METHOD:
    case MR_CONNECTION_UPDATE_SECRET_OK: return e->state >= MR_OPEN;
    default: return false;
  }
}

bool mr_connection_method(mr_engine *e, amqp_method_number_t method, amqp_bytes_t args,
                          mr_event *event) {
  if (!is_expected(e, method)) {
    mr_protocol_error(e, AMQP_COMMAND_INVALID, "method %u.%u on channel 0 out of place",
                      method >> 16, method & 0xFFFF);
    return false;
  }
  const char *wrong = mr_method_check(method, args);
  if (wrong) {
    mr_protocol_error(e, AMQP_SYNTAX_ERROR, "method %u.%u: %s", method >> 16, method & 0xFFFF,
                      wrong);
    return false;
  }
  switch (method) {
    case AMQP_CONNECTION_START_METHOD: on_start(e, args); return false;
    case AMQP_CONNECTION_TUNE_METHOD: on_tune(e, args); return false;
    case AMQP_CONNECTION_OPEN_OK_METHOD: return on_open_ok(e, event);
    case AMQP_CONNECTION_CLOSE_METHOD: on_close(e, args); return false;
    case AMQP_CONNECTION_CLOSE_OK_METHOD:
      mr_end(e, MR_KIND_CLOSED, AMQP_REPLY_SUCCESS, "closed");
      return false;
    case AMQP_CONNECTION_BLOCKED_METHOD: return on_blocked(e, args, event);
    case AMQP_CONNECTION_UNBLOCKED_METHOD: return on_unblocked(e, event);
    case MR_CONNECTION_UPDATE_SECRET_OK: return on_secret_ok(e, event);
    default:
      mr_end(e, MR_KIND_AUTH, 0, "the broker asks %s for a second step", e->mechanism);
      return false;
  }
}

mr_status mr_engine_update_secret(mr_engine *e, amqp_bytes_t secret, amqp_bytes_t reason) {
  if (e->state != MR_OPEN) return MR_CLOSED;
  size_t payload = 4 + 4 + secret.len + 1 + reason.len;
  if (reason.len > MR_SHORTSTR_MAX) return MR_BAD_ARGUMENT;
  if (payload > e->tuned.frame_max - MR_FRAME_OVERHEAD) return MR_TOO_LARGE;
  if (mr_calls_reserve(&e->calls) != MR_OK) return MR_NO_MEMORY;
  uint8_t *p = mr_buffer_reserve(&e->tx, payload + MR_FRAME_OVERHEAD);
  if (!p) return MR_NO_MEMORY;
  p = mr_put_frame_header(p, AMQP_FRAME_METHOD, 0, (uint32_t)payload);
  p = mr_put_longstr(mr_put32(p, MR_CONNECTION_UPDATE_SECRET), secret);
  mr_put8(mr_put_shortstr(p, reason), MR_FRAME_END);
  e->tx.tail += payload + MR_FRAME_OVERHEAD;
  e->tx.secret = true;
  mr_calls_push(&e->calls, (mr_call_entry){.reply = MR_CONNECTION_UPDATE_SECRET_OK});
  return MR_OK;
}
