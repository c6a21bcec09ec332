/*
 * Methods by name. One table describes every method without content that a client sends, or that
 * answers one: its fields, where they are in rabbitmq-c's struct, and their types.
 */
#include <stddef.h>

#include "lua/binding.h"

typedef enum { F_BIT, F_U16, F_U32, F_SHORT, F_LONG, F_TABLE } field_type;

typedef struct {
  const char *name;
  size_t offset;
  field_type type;
} field;

typedef struct {
  const char *name;
  amqp_method_number_t id;
  const field *fields; /* ends with a NULL name; `ticket` is left out: it is always 0 */
  bool sent;           /* by Channel:call */
} method;

#define END \
  { NULL, 0, F_BIT }
#define FIELDS(name) static const field name##_fields[]
#define F(s, f, type) \
  { #f, offsetof(amqp_##s##_t, f), type }

static const field no_fields[] = {END};
FIELDS(channel_open_ok) = {F(channel_open_ok, channel_id, F_LONG), END};
FIELDS(channel_flow) = {F(channel_flow, active, F_BIT), END};
FIELDS(channel_flow_ok) = {F(channel_flow_ok, active, F_BIT), END};
FIELDS(exchange_declare) = {F(exchange_declare, exchange, F_SHORT),
                            F(exchange_declare, type, F_SHORT),
                            F(exchange_declare, passive, F_BIT),
                            F(exchange_declare, durable, F_BIT),
                            F(exchange_declare, auto_delete, F_BIT),
                            F(exchange_declare, internal, F_BIT),
                            F(exchange_declare, nowait, F_BIT),
                            F(exchange_declare, arguments, F_TABLE),
                            END};
FIELDS(exchange_delete) = {F(exchange_delete, exchange, F_SHORT),
                           F(exchange_delete, if_unused, F_BIT), F(exchange_delete, nowait, F_BIT),
                           END};
FIELDS(exchange_bind) = {F(exchange_bind, destination, F_SHORT), F(exchange_bind, source, F_SHORT),
                         F(exchange_bind, routing_key, F_SHORT), F(exchange_bind, nowait, F_BIT),
                         F(exchange_bind, arguments, F_TABLE),   END};
FIELDS(exchange_unbind) = {
    F(exchange_unbind, destination, F_SHORT), F(exchange_unbind, source, F_SHORT),
    F(exchange_unbind, routing_key, F_SHORT), F(exchange_unbind, nowait, F_BIT),
    F(exchange_unbind, arguments, F_TABLE),   END};
FIELDS(queue_declare) = {F(queue_declare, queue, F_SHORT),     F(queue_declare, passive, F_BIT),
                         F(queue_declare, durable, F_BIT),     F(queue_declare, exclusive, F_BIT),
                         F(queue_declare, auto_delete, F_BIT), F(queue_declare, nowait, F_BIT),
                         F(queue_declare, arguments, F_TABLE), END};
FIELDS(queue_declare_ok) = {F(queue_declare_ok, queue, F_SHORT),
                            F(queue_declare_ok, message_count, F_U32),
                            F(queue_declare_ok, consumer_count, F_U32), END};
FIELDS(queue_bind) = {F(queue_bind, queue, F_SHORT),       F(queue_bind, exchange, F_SHORT),
                      F(queue_bind, routing_key, F_SHORT), F(queue_bind, nowait, F_BIT),
                      F(queue_bind, arguments, F_TABLE),   END};
FIELDS(queue_unbind) = {F(queue_unbind, queue, F_SHORT), F(queue_unbind, exchange, F_SHORT),
                        F(queue_unbind, routing_key, F_SHORT), F(queue_unbind, arguments, F_TABLE),
                        END};
FIELDS(queue_purge) = {F(queue_purge, queue, F_SHORT), F(queue_purge, nowait, F_BIT), END};
FIELDS(queue_purge_ok) = {F(queue_purge_ok, message_count, F_U32), END};
FIELDS(queue_delete) = {F(queue_delete, queue, F_SHORT), F(queue_delete, if_unused, F_BIT),
                        F(queue_delete, if_empty, F_BIT), F(queue_delete, nowait, F_BIT), END};
FIELDS(queue_delete_ok) = {F(queue_delete_ok, message_count, F_U32), END};
FIELDS(basic_qos) = {F(basic_qos, prefetch_size, F_U32), F(basic_qos, prefetch_count, F_U16),
                     F(basic_qos, global, F_BIT), END};
FIELDS(basic_consume) = {
    F(basic_consume, queue, F_SHORT),     F(basic_consume, consumer_tag, F_SHORT),
    F(basic_consume, no_local, F_BIT),    F(basic_consume, no_ack, F_BIT),
    F(basic_consume, exclusive, F_BIT),   F(basic_consume, nowait, F_BIT),
    F(basic_consume, arguments, F_TABLE), END};
FIELDS(basic_consume_ok) = {F(basic_consume_ok, consumer_tag, F_SHORT), END};
FIELDS(basic_cancel) = {F(basic_cancel, consumer_tag, F_SHORT), F(basic_cancel, nowait, F_BIT),
                        END};
FIELDS(basic_cancel_ok) = {F(basic_cancel_ok, consumer_tag, F_SHORT), END};
FIELDS(basic_get_empty) = {F(basic_get_empty, cluster_id, F_SHORT), END};
FIELDS(basic_recover) = {F(basic_recover, requeue, F_BIT), END};
FIELDS(basic_recover_async) = {F(basic_recover_async, requeue, F_BIT), END};
FIELDS(confirm_select) = {F(confirm_select, nowait, F_BIT), END};

static const method METHODS[] = {
    {"channel.flow", AMQP_CHANNEL_FLOW_METHOD, channel_flow_fields, true},
    {"exchange.declare", AMQP_EXCHANGE_DECLARE_METHOD, exchange_declare_fields, true},
    {"exchange.delete", AMQP_EXCHANGE_DELETE_METHOD, exchange_delete_fields, true},
    {"exchange.bind", AMQP_EXCHANGE_BIND_METHOD, exchange_bind_fields, true},
    {"exchange.unbind", AMQP_EXCHANGE_UNBIND_METHOD, exchange_unbind_fields, true},
    {"queue.declare", AMQP_QUEUE_DECLARE_METHOD, queue_declare_fields, true},
    {"queue.bind", AMQP_QUEUE_BIND_METHOD, queue_bind_fields, true},
    {"queue.unbind", AMQP_QUEUE_UNBIND_METHOD, queue_unbind_fields, true},
    {"queue.purge", AMQP_QUEUE_PURGE_METHOD, queue_purge_fields, true},
    {"queue.delete", AMQP_QUEUE_DELETE_METHOD, queue_delete_fields, true},
    {"basic.qos", AMQP_BASIC_QOS_METHOD, basic_qos_fields, true},
    {"basic.cancel", AMQP_BASIC_CANCEL_METHOD, basic_cancel_fields, true},
    {"basic.recover", AMQP_BASIC_RECOVER_METHOD, basic_recover_fields, true},
    {"basic.recover-async", AMQP_BASIC_RECOVER_ASYNC_METHOD, basic_recover_async_fields, true},
    {"confirm.select", AMQP_CONFIRM_SELECT_METHOD, confirm_select_fields, true},
    {"tx.select", AMQP_TX_SELECT_METHOD, no_fields, true},
    {"tx.commit", AMQP_TX_COMMIT_METHOD, no_fields, true},
    {"tx.rollback", AMQP_TX_ROLLBACK_METHOD, no_fields, true},
    {"connection.update-secret-ok", MR_CONNECTION_UPDATE_SECRET_OK, no_fields, false},
    {"channel.open-ok", AMQP_CHANNEL_OPEN_OK_METHOD, channel_open_ok_fields, false},
    {"channel.flow-ok", AMQP_CHANNEL_FLOW_OK_METHOD, channel_flow_ok_fields, false},
    {"channel.close-ok", AMQP_CHANNEL_CLOSE_OK_METHOD, no_fields, false},
    {"exchange.declare-ok", AMQP_EXCHANGE_DECLARE_OK_METHOD, no_fields, false},
    {"exchange.delete-ok", AMQP_EXCHANGE_DELETE_OK_METHOD, no_fields, false},
    {"exchange.bind-ok", AMQP_EXCHANGE_BIND_OK_METHOD, no_fields, false},
    {"exchange.unbind-ok", AMQP_EXCHANGE_UNBIND_OK_METHOD, no_fields, false},
    {"queue.declare-ok", AMQP_QUEUE_DECLARE_OK_METHOD, queue_declare_ok_fields, false},
    {"queue.bind-ok", AMQP_QUEUE_BIND_OK_METHOD, no_fields, false},
    {"queue.unbind-ok", AMQP_QUEUE_UNBIND_OK_METHOD, no_fields, false},
    {"queue.purge-ok", AMQP_QUEUE_PURGE_OK_METHOD, queue_purge_ok_fields, false},
    {"queue.delete-ok", AMQP_QUEUE_DELETE_OK_METHOD, queue_delete_ok_fields, false},
    {"basic.qos-ok", AMQP_BASIC_QOS_OK_METHOD, no_fields, false},
    {"basic.consume-ok", AMQP_BASIC_CONSUME_OK_METHOD, basic_consume_ok_fields, false},
    {"basic.cancel-ok", AMQP_BASIC_CANCEL_OK_METHOD, basic_cancel_ok_fields, false},
    {"basic.get-empty", AMQP_BASIC_GET_EMPTY_METHOD, basic_get_empty_fields, false},
    {"basic.recover-ok", AMQP_BASIC_RECOVER_OK_METHOD, no_fields, false},
    {"confirm.select-ok", AMQP_CONFIRM_SELECT_OK_METHOD, no_fields, false},
    {"tx.select-ok", AMQP_TX_SELECT_OK_METHOD, no_fields, false},
    {"tx.commit-ok", AMQP_TX_COMMIT_OK_METHOD, no_fields, false},
    {"tx.rollback-ok", AMQP_TX_ROLLBACK_OK_METHOD, no_fields, false},
    /* sent by functions of their own; here for their names in errors */
    {"connection.open", AMQP_CONNECTION_OPEN_METHOD, no_fields, false},
    {"channel.open", AMQP_CHANNEL_OPEN_METHOD, no_fields, false},
    {"channel.close", AMQP_CHANNEL_CLOSE_METHOD, no_fields, false},
    {"basic.consume", AMQP_BASIC_CONSUME_METHOD, basic_consume_fields, false},
    {"basic.get", AMQP_BASIC_GET_METHOD, no_fields, false},
    {"basic.publish", AMQP_BASIC_PUBLISH_METHOD, no_fields, false},
    {"basic.ack", AMQP_BASIC_ACK_METHOD, no_fields, false},
    {"basic.nack", AMQP_BASIC_NACK_METHOD, no_fields, false},
    {"basic.reject", AMQP_BASIC_REJECT_METHOD, no_fields, false},
    {NULL, 0, NULL, false}};

/* Room for any of the structs above. */
typedef union {
  amqp_exchange_declare_t exchange_declare;
  amqp_exchange_bind_t exchange_bind;
  amqp_queue_declare_t queue_declare;
  amqp_queue_bind_t queue_bind;
  amqp_basic_consume_t basic_consume;
  amqp_basic_cancel_t basic_cancel;
} any_method;

static const method *method_by_id(amqp_method_number_t id) {
  const method *m = METHODS;
  while (m->name && m->id != id) m++;
  return m->name ? m : NULL;
}

static const method *method_by_name(const char *name) {
  const method *m = METHODS;
  while (m->name && strcmp(m->name, name) != 0) m++;
  return m->name ? m : NULL;
}

static const field *find_field(const method *m, const char *name) {
  const field *f = m->fields;
  while (f->name && strcmp(f->name, name) != 0) f++;
  return f->name ? f : NULL;
}

/* ---- from Lua; the value is on top of the stack ---- */

static void wrong_type(lua_State *L, const method *m, const field *f, const char *wanted) {
  luaL_error(L, "%s: field '%s': %s expected, got %s", m->name, f->name, wanted,
             luaL_typename(L, -1));
}

static amqp_bytes_t read_string(lua_State *L, const method *m, const field *f) {
  size_t len;
  const char *s;
  if (lua_type(L, -1) != LUA_TSTRING) wrong_type(L, m, f, "string");
  s = lua_tolstring(L, -1, &len);
  if (f->type == F_SHORT && len > 255)
    luaL_error(L, "%s: field '%s': longer than 255 bytes", m->name, f->name);
  return mrl_bytes(s, len);
}

static int64_t read_integer(lua_State *L, const method *m, const field *f, int64_t max) {
  int64_t n = 0;
  if (lua_type(L, -1) != LUA_TNUMBER) wrong_type(L, m, f, "number");
  if (!mr_exact_integer(L, -1, &n) || n < 0 || n > max)
    luaL_error(L, "%s: field '%s': not an integer in range", m->name, f->name);
  return n;
}

static void read_field(lua_State *L, const method *m, const field *f, void *at) {
  switch (f->type) {
    case F_BIT:
      if (lua_type(L, -1) != LUA_TBOOLEAN) wrong_type(L, m, f, "boolean");
      *(amqp_boolean_t *)at = lua_toboolean(L, -1);
      return;
    case F_U16: *(uint16_t *)at = (uint16_t)read_integer(L, m, f, UINT16_MAX); return;
    case F_U32: *(uint32_t *)at = (uint32_t)read_integer(L, m, f, UINT32_MAX); return;
    case F_TABLE: mrl_to_table(L, -1, f->name, true, at); return;
    default: *(amqp_bytes_t *)at = read_string(L, m, f);
  }
}

/* The key is below the top of the stack. */
static void unknown_field(lua_State *L, const method *m) {
  if (lua_type(L, -2) == LUA_TSTRING)
    luaL_error(L, "%s: unknown field '%s'", m->name, lua_tostring(L, -2));
  luaL_error(L, "%s: the name of a field must be a string", m->name);
}

/* Fills the zeroed struct from the table (or nil) at `i`. */
static void read_fields(lua_State *L, int i, const method *m, void *out) {
  mrl_arena_reset(&mrl_get_state(L)->arena);
  if (lua_isnoneornil(L, i)) return;
  luaL_checktype(L, i, LUA_TTABLE);
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    const field *f = lua_type(L, -2) == LUA_TSTRING ? find_field(m, lua_tostring(L, -2)) : NULL;
    if (!f) {
      unknown_field(L, m);
      return;
    }
    read_field(L, m, f, (char *)out + f->offset);
  }
}

/* Nobody is told of the answer to a cancel without one; what still comes goes back to the broker. The
 * channel is at index 1. */
static void forget_queue(lua_State *L, amqp_bytes_t consumer_tag) {
  int top = lua_gettop(L);
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, top + 1, MR_ANCHOR_ENGINE);
  mr_get_uservalue(L, -1);
  lua_rawgeti(L, -1, MR_ENGINE_QUEUES);
  mrl_take_queue(L, top + 1, lua_gettop(L), consumer_tag, false);
  lua_settop(L, top);
}

int mrl_call(lua_State *L) {
  mrl_channel *channel = mrl_check_channel(L, 1);
  amqp_bytes_t name = mrl_check_string(L, 2);
  const method *m = method_by_name(name.bytes);
  any_method decoded;
  if (!m || !m->sent)
    return luaL_argerror(L, 2,
                         lua_pushfstring(L, "'%s' cannot be called", (const char *)name.bytes));
  memset(&decoded, 0, sizeof decoded);
  read_fields(L, 3, m, &decoded);
  if (!channel->handle) return mrl_push_refusal(L, MR_CLOSED);
  if (m->id == AMQP_BASIC_CANCEL_METHOD) mrl_end_queue(L, decoded.basic_cancel.consumer_tag);
  mr_status status = mr_call(channel->handle, m->id, &decoded);
  /* Not in a finalizer within pump, which may be filling that very queue. */
  if (status >= 0 && m->id == AMQP_BASIC_CANCEL_METHOD && decoded.basic_cancel.nowait &&
      !channel->engine->busy)
    forget_queue(L, decoded.basic_cancel.consumer_tag);
  return mrl_push_done(L, status);
}

void mrl_read_consume(lua_State *L, int i, amqp_basic_consume_t *out) {
  const method *m = method_by_id(AMQP_BASIC_CONSUME_METHOD);
  memset(out, 0, sizeof *out);
  read_fields(L, i, m, out);
  if (out->consumer_tag.len == 0) luaL_error(L, "%s: field 'consumer_tag' must be set", m->name);
}

/* ---- to Lua ---- */

void mrl_push_method_name(lua_State *L, amqp_method_number_t id) {
  const method *m = method_by_id(id);
  if (m)
    lua_pushstring(L, m->name);
  else
    lua_pushnil(L);
}

static void push_field(lua_State *L, const field *f, const void *at) {
  switch (f->type) {
    case F_BIT: lua_pushboolean(L, *(const amqp_boolean_t *)at != 0); return;
    case F_U16: lua_pushinteger(L, *(const uint16_t *)at); return;
    case F_U32: mr_push_int64(L, *(const uint32_t *)at); return;
    case F_TABLE: mrl_push_table(L, at, NULL); return;
    default: mrl_push_bytes(L, *(const amqp_bytes_t *)at);
  }
}

void mrl_push_method_fields(lua_State *L, const amqp_method_t *sent) {
  const method *m = method_by_id(sent->id);
  lua_newtable(L);
  if (!m || !sent->decoded) return;
  for (const field *f = m->fields; f->name; f++) {
    push_field(L, f, (const char *)sent->decoded + f->offset);
    lua_setfield(L, -2, f->name);
  }
}
