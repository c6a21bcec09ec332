/*
 * Message: a delivery, the answer to a get, or a returned publish, in one userdata. Nothing is made
 * before it is read; properties and headers are then kept in tables with weak keys. A body that is
 * not small is a Lua string from the start: copied once, and half the work for the collector. From
 * 5.4 on it is a second user value; before, it stands in a table that takes the anchor's place.
 */
#include "lua/binding.h"

enum { LARGE_BODY = 256 };

static mrl_message *check_message(lua_State *L) {
  return mrl_check_tag(L, 1, MR_IS_MESSAGE, sizeof(mrl_message));
}

/* ---- making one ---- */

static char *put(char *to, amqp_bytes_t b) {
  if (b.len) memcpy(to, b.bytes, b.len);
  return to + b.len;
}

#if LUA_VERSION_NUM >= 504

static mrl_message *new_userdata(lua_State *L, size_t size, bool large) {
  return lua_newuserdatauv(L, size, large ? 2 : 1);
}

/* The message is on top of the stack. */
static void keep_values(lua_State *L, amqp_bytes_t body, bool large, int anchor) {
  lua_pushvalue(L, anchor);
  lua_setiuservalue(L, -2, 1);
  if (!large) return;
  mrl_push_bytes(L, body);
  lua_setiuservalue(L, -2, 2);
}

/* Pushes the body of a large message. */
static void push_large_body(lua_State *L, int i) { lua_getiuservalue(L, i, 2); }

#else

static mrl_message *new_userdata(lua_State *L, size_t size, bool large) {
  (void)large;
  return mr_new_userdata(L, size);
}

/* Pushes { owner, channel, body } for a message with a large body. */
static void push_large(lua_State *L, amqp_bytes_t body, int anchor) {
  lua_createtable(L, 3, 0);
  lua_rawgeti(L, anchor, MR_ANCHOR_OWNER);
  lua_rawseti(L, -2, MR_ANCHOR_OWNER);
  lua_rawgeti(L, anchor, MR_ANCHOR_CHANNEL);
  lua_rawseti(L, -2, MR_ANCHOR_CHANNEL);
  mrl_push_bytes(L, body);
  lua_rawseti(L, -2, MR_LARGE_BODY);
}

/* The message is on top of the stack. */
static void keep_values(lua_State *L, amqp_bytes_t body, bool large, int anchor) {
  if (large)
    push_large(L, body, anchor);
  else
    lua_pushvalue(L, anchor);
  mr_set_uservalue(L, -2);
}

/* Pushes the body of a large message. */
static void push_large_body(lua_State *L, int i) {
  mr_get_uservalue(L, i);
  lua_rawgeti(L, -1, MR_LARGE_BODY);
  lua_replace(L, -2);
}

#endif

static void fill(mrl_message *m, const mr_event *event, mrl_channel *channel, bool large) {
  const mr_content *c = &event->content;
  m->is = MR_IS_MESSAGE;
  m->channel = channel;
  m->tag = c->delivery_tag;
  m->body_len = c->body.len;
  m->props_len = (uint32_t)c->props.len;
  m->message_count = c->message_count;
  m->reply_code = c->reply_code;
  m->exchange_len = (uint8_t)c->exchange.len;
  m->key_len = (uint8_t)c->routing_key.len;
  m->consumer_len = (uint8_t)c->consumer_tag.len;
  m->text_len = (uint8_t)c->reply_text.len;
  m->type = (uint8_t)event->type;
  m->redelivered = c->redelivered;
  m->no_ack = c->no_ack || event->type == MR_EV_RETURN;
  m->settled = false;
  m->large = large;
  char *to = put(m->data, c->exchange);
  to = put(to, c->routing_key);
  to = put(to, c->consumer_tag);
  to = put(to, c->reply_text);
  to = put(to, c->props);
  if (!large) put(to, c->body);
}

mrl_message *mrl_message_new(lua_State *L, const mr_event *event, mrl_channel *channel,
                             int anchor) {
  const mr_content *c = &event->content;
  bool large = c->body.len > LARGE_BODY;
  size_t size = sizeof(mrl_message) + c->exchange.len + c->routing_key.len + c->consumer_tag.len +
                c->reply_text.len + c->props.len + (large ? 0 : c->body.len);
  mrl_message *m = new_userdata(L, size, large);
  fill(m, event, channel, large);
  keep_values(L, c->body, large, anchor);
  lua_pushvalue(L, lua_upvalueindex(MR_UP_MESSAGE));
  lua_setmetatable(L, -2);
  return m;
}

/* ---- settling ---- */

/* Pushes the owner of the channel of the message at 1. */
static void push_owner(lua_State *L) {
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, -1, MR_ANCHOR_OWNER);
  lua_replace(L, -2);
}

/* Results: whether to flush, and the owner, which the caller needs at once. The message is at 1. */
static int settle(lua_State *L, mrl_message *m, mr_settle_kind kind, bool requeue) {
  if (MR_UNLIKELY(m->no_ack)) return mrl_push_refusal(L, MR_UNKNOWN_TAG);
  /* The core knows what is settled, and what a rollback gave back; the flag outlives the channel. */
  mr_channel *handle = m->channel->handle;
  mr_status status = handle ? mr_settle(handle, m->tag, kind, requeue) : MR_CLOSED;
  if (MR_UNLIKELY(status < 0)) {
    if (status == MR_SETTLED) m->settled = true;
    if (status == MR_CLOSED && m->settled) status = MR_SETTLED;
    return mrl_push_refusal(L, status);
  }
  m->settled = true;
  lua_pushboolean(L, status == MR_FLUSH);
  push_owner(L);
  return 2;
}

int mrl_ack(lua_State *L) {
  mrl_message *m = check_message(L);
  if (!m->no_ack && m->channel->handle) m->channel->engine->told = true;
  return settle(L, m, MR_SETTLE_ACK, false);
}

enum { UP_FULL = MR_UP_COUNT + 1, UP_FLUSH };

/* Calls a function of Lua's, which must not yield, with the value on top of the stack. */
static int hand_over(lua_State *L, int up, int results) {
  lua_pushvalue(L, lua_upvalueindex(up));
  lua_insert(L, -2);
  lua_call(L, 1, results);
  return results;
}

/* msg:ack(): Lua runs only where it has something to do. */
static int ack_method(lua_State *L) {
  mrl_message *m = check_message(L);
  mr_status status = MR_CLOSED;
  if (MR_LIKELY(!m->no_ack && m->channel->handle && m->channel->engine->told))
    status = mr_settle(m->channel->handle, m->tag, MR_SETTLE_ACK, false);
  if (MR_UNLIKELY(status < 0)) {
    lua_settop(L, 1);
    return hand_over(L, UP_FULL, 2);
  }
  m->settled = true;
  if (status == MR_FLUSH) {
    push_owner(L);
    hand_over(L, UP_FLUSH, 0);
  }
  lua_pushboolean(L, 1);
  return 1;
}

int mrl_acker(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  luaL_checktype(L, 2, LUA_TFUNCTION);
  luaL_checkstack(L, MR_UP_COUNT + 2, NULL);
  for (int i = 1; i <= MR_UP_COUNT; i++) lua_pushvalue(L, lua_upvalueindex(i));
  lua_pushvalue(L, 1);
  lua_pushvalue(L, 2);
  lua_pushcclosure(L, ack_method, MR_UP_COUNT + 2);
  return 1;
}

int mrl_settle(lua_State *L) {
  mrl_message *m = check_message(L);
  mr_settle_kind kind = mrl_check_settle(L, 2, false);
  return settle(L, m, kind, mrl_opt_boolean(L, 3, false));
}

/* True; or nil and what settling it would answer. */
int mrl_outstanding(lua_State *L) {
  const mrl_message *m = check_message(L);
  if (m->no_ack) return mrl_push_refusal(L, MR_UNKNOWN_TAG);
  mr_channel *handle = m->channel->handle;
  mr_status status = handle ? mr_outstanding(handle, m->tag) : MR_CLOSED;
  if (status == MR_CLOSED && m->settled) status = MR_SETTLED;
  return mrl_push_done(L, status);
}

void mrl_message_return(mrl_message *m) {
  if (m->no_ack || !m->channel->handle) return;
  if (mr_settle(m->channel->handle, m->tag, MR_SETTLE_NACK, true) >= 0) m->settled = true;
}

/* ---- reading ---- */

typedef enum {
  KEY_ACK,
  KEY_BODY,
  KEY_DELIVERY_TAG,
  KEY_ROUTING_KEY,
  KEY_HEADERS,
  KEY_PROPERTIES,
  KEY_EXCHANGE,
  KEY_REDELIVERED,
  KEY_CONSUMER_TAG,
  KEY_CHANNEL,
  KEY_MESSAGE_COUNT,
  KEY_REPLY_CODE,
  KEY_REPLY_TEXT,
  KEY_MESSAGE_ID,
  KEY_COUNT
} message_key;

const char *const mrl_message_keys[] = {
    "ack",           "body",       "delivery_tag", "routing_key",  "headers",
    "properties",    "exchange",   "redelivered",  "consumer_tag", "channel",
    "message_count", "reply_code", "reply_text",   "message_id",   NULL};

amqp_bytes_t mrl_message_props(const mrl_message *m) {
  size_t at = (size_t)m->exchange_len + m->key_len + m->consumer_len + m->text_len;
  return mrl_bytes(m->data + at, m->props_len);
}

amqp_bytes_t mrl_message_body(lua_State *L, int i, const mrl_message *m) {
  size_t len;
  amqp_bytes_t props = mrl_message_props(m);
  if (!m->large) return mrl_bytes((const char *)props.bytes + props.len, m->body_len);
  push_large_body(L, i);
  const char *s = lua_tolstring(L, -1, &len);
  lua_pop(L, 1);
  return mrl_bytes(s, len);
}

static void push_body(lua_State *L, const mrl_message *m) {
  if (!m->large) {
    size_t at = (size_t)m->exchange_len + m->key_len + m->consumer_len + m->text_len + m->props_len;
    lua_pushlstring(L, m->data + at, m->body_len);
    return;
  }
  push_large_body(L, 1);
}

/* Pushes cache[message], or stores and pushes what `make` pushes. */
static void push_cached(lua_State *L, int cache, const mrl_message *m,
                        void (*make)(lua_State *, const mrl_message *)) {
  lua_pushvalue(L, 1);
  lua_rawget(L, lua_upvalueindex(cache));
  if (!lua_isnil(L, -1)) return;
  lua_pop(L, 1);
  make(L, m);
  lua_pushvalue(L, 1);
  lua_pushvalue(L, -2);
  lua_rawset(L, lua_upvalueindex(cache));
}

static void make_properties(lua_State *L, const mrl_message *m) {
  mrl_push_properties(L, mrl_message_props(m));
}

/* The same table as properties.headers, or an empty one. */
static void make_headers(lua_State *L, const mrl_message *m) {
  push_cached(L, MR_UP_PROPERTIES, m, make_properties);
  lua_getfield(L, -1, "headers");
  lua_remove(L, -2);
  if (lua_istable(L, -1)) return;
  lua_pop(L, 1);
  lua_newtable(L);
}

static void push_optional(lua_State *L, bool present, int64_t n) {
  if (present)
    mr_push_int64(L, n);
  else
    lua_pushnil(L);
}

static void push_consumer_tag(lua_State *L, const mrl_message *m) {
  if (m->type == MR_EV_DELIVER)
    lua_pushlstring(L, m->data + m->exchange_len + m->key_len, m->consumer_len);
  else
    lua_pushnil(L);
}

static void push_reply_text(lua_State *L, const mrl_message *m) {
  if (m->type == MR_EV_RETURN)
    lua_pushlstring(L, m->data + m->exchange_len + m->key_len + m->consumer_len, m->text_len);
  else
    lua_pushnil(L);
}

/* The one property that is asked for of every message, for de-duplication: no table is made. */
static void push_message_id(lua_State *L, const mrl_message *m) {
  amqp_bytes_t id = mr_props_message_id(mrl_message_props(m));
  if (id.bytes)
    mrl_push_bytes(L, id);
  else
    lua_pushnil(L);
}

/* core.key_without(message, name): its routing key, where it has no header of that name; else nil, and so for what is no
 * message. The router asks it of every message, so it is one call. */
int mrl_key_without(lua_State *L) {
  const mrl_message *m = mrl_test_tag(L, 1, MR_IS_MESSAGE, sizeof(mrl_message));
  size_t len;
  const char *name = luaL_checklstring(L, 2, &len);
  if (m && !mr_props_has_header(mrl_message_props(m), mrl_bytes(name, len)))
    lua_pushlstring(L, m->data + m->exchange_len, m->key_len);
  else
    lua_pushnil(L);
  return 1;
}

static void push_field(lua_State *L, const mrl_message *m, message_key key) {
  switch (key) {
    case KEY_BODY: push_body(L, m); return;
    case KEY_DELIVERY_TAG: push_optional(L, m->type != MR_EV_RETURN, (int64_t)m->tag); return;
    case KEY_ROUTING_KEY: lua_pushlstring(L, m->data + m->exchange_len, m->key_len); return;
    case KEY_EXCHANGE: lua_pushlstring(L, m->data, m->exchange_len); return;
    case KEY_HEADERS: push_cached(L, MR_UP_HEADERS, m, make_headers); return;
    case KEY_PROPERTIES: push_cached(L, MR_UP_PROPERTIES, m, make_properties); return;
    case KEY_REDELIVERED: lua_pushboolean(L, m->redelivered); return;
    case KEY_CONSUMER_TAG: push_consumer_tag(L, m); return;
    case KEY_CHANNEL: push_owner(L); return;
    case KEY_MESSAGE_COUNT: push_optional(L, m->type == MR_EV_GET_OK, m->message_count); return;
    case KEY_REPLY_CODE: push_optional(L, m->type == MR_EV_RETURN, m->reply_code); return;
    case KEY_REPLY_TEXT: push_reply_text(L, m); return;
    case KEY_MESSAGE_ID: push_message_id(L, m); return;
    default: lua_pushnil(L);
  }
}

static void push_method(lua_State *L) {
  lua_pushvalue(L, 2);
  lua_rawget(L, lua_upvalueindex(MR_UP_MESSAGE_METHODS));
}

/* Fields are told by the address of their interned names; names that are no field are methods. */
static int message_index(lua_State *L) {
  const mrl_message *m = check_message(L);
  const mrl_state *st = mrl_get_state(L);
  if (MR_UNLIKELY(lua_type(L, 2) != LUA_TSTRING)) return 0;
  const char *name = lua_tostring(L, 2);
  const char *const *keys = st->keys + MR_KEYS_MESSAGE;
  int key = KEY_ACK;
  while (key < KEY_COUNT && keys[key] != name) key++;
  if (key == KEY_ACK || key == KEY_COUNT) {
    push_method(L);
    if (key == KEY_ACK || !lua_isnil(L, -1)) return 1;
    lua_pop(L, 1);
    key = mrl_find_key(st, name, MR_KEYS_MESSAGE, mrl_message_keys, KEY_COUNT);
    if (key < 0) return 0;
  }
  push_field(L, m, (message_key)key);
  return 1;
}

static int message_newindex(lua_State *L) {
  return luaL_error(L, "a message cannot be changed (field '%s')",
                    lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : luaL_typename(L, 2));
}

static int message_tostring(lua_State *L) {
  const mrl_message *m = check_message(L);
  lua_pushliteral(L, "moonrabbit.message: ");
  lua_pushlstring(L, m->data, m->exchange_len);
  lua_pushliteral(L, "/");
  lua_pushlstring(L, m->data + m->exchange_len, m->key_len);
  lua_pushfstring(L, ", %d bytes", (int)m->body_len);
  lua_concat(L, 5);
  return 1;
}

int mrl_is_message(lua_State *L) {
  lua_pushboolean(L, mrl_test_tag(L, 1, MR_IS_MESSAGE, sizeof(mrl_message)) != NULL);
  return 1;
}

const luaL_Reg mrl_message_functions[] = {{"__index", message_index},
                                          {"__newindex", message_newindex},
                                          {"__tostring", message_tostring},
                                          {NULL, NULL}};
