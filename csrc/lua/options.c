/*
 * The options of a publish, and properties as tables.
 *
 * publish is the hottest call there is: the caller's table is walked once with lua_next, each key is
 * told by its address (mrl_find_key), and nothing here allocates Lua memory.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>

#include "lua/binding.h"

typedef enum {
  OPT_KEY,
  OPT_EXCHANGE,
  OPT_MANDATORY,
  OPT_PERSISTENT,
  OPT_TIMEOUT, /* not properties */
  OPT_STRING,
  OPT_HEADERS,
  OPT_DELIVERY_MODE,
  OPT_PRIORITY,
  OPT_EXPIRATION,
  OPT_TIMESTAMP
} option_kind;

typedef struct {
  option_kind kind;
  amqp_flags_t flag; /* of a property, else 0 */
  size_t offset;     /* of an OPT_STRING in amqp_basic_properties_t */
} option;

#define PROPERTY(kind, flag, field) \
  { kind, AMQP_BASIC_##flag##_FLAG, offsetof(amqp_basic_properties_t, field) }

/* The likely ones first. */
static const char *const NAMES[] = {
    "routing_key", "exchange",     "headers",        "mandatory",     "persistent",
    "message_id",  "content_type", "correlation_id", "reply_to",      "expiration",
    "priority",    "timestamp",    "type",           "delivery_mode", "content_encoding",
    "user_id",     "app_id",       "cluster_id",     "timeout"};
static const option OPTIONS[] = {
    {OPT_KEY, 0, 0},
    {OPT_EXCHANGE, 0, 0},
    PROPERTY(OPT_HEADERS, HEADERS, headers),
    {OPT_MANDATORY, 0, 0},
    {OPT_PERSISTENT, 0, 0},
    PROPERTY(OPT_STRING, MESSAGE_ID, message_id),
    PROPERTY(OPT_STRING, CONTENT_TYPE, content_type),
    PROPERTY(OPT_STRING, CORRELATION_ID, correlation_id),
    PROPERTY(OPT_STRING, REPLY_TO, reply_to),
    PROPERTY(OPT_EXPIRATION, EXPIRATION, expiration),
    PROPERTY(OPT_PRIORITY, PRIORITY, priority),
    PROPERTY(OPT_TIMESTAMP, TIMESTAMP, timestamp),
    PROPERTY(OPT_STRING, TYPE, type),
    PROPERTY(OPT_DELIVERY_MODE, DELIVERY_MODE, delivery_mode),
    PROPERTY(OPT_STRING, CONTENT_ENCODING, content_encoding),
    PROPERTY(OPT_STRING, USER_ID, user_id),
    PROPERTY(OPT_STRING, APP_ID, app_id),
    PROPERTY(OPT_STRING, CLUSTER_ID, cluster_id),
    {OPT_TIMEOUT, 0, 0},
};
enum { N_OPTIONS = sizeof OPTIONS / sizeof OPTIONS[0] };

const char *const *mrl_option_names(int *n) {
  *n = N_OPTIONS;
  return NAMES;
}

amqp_flags_t mrl_property_flag(const char *name) {
  for (int i = 0; i < N_OPTIONS; i++)
    if (strcmp(NAMES[i], name) == 0) return OPTIONS[i].flag;
  return 0;
}

/* ---- errors ---- */

/* Length of the part of a source's name that all modules of the library share; 0: it is none. */
static size_t own_prefix(const char *source) {
  static const char folder[] = "moonrabbit/";
  size_t length = 0;
  for (const char *at = strstr(source, folder); at; at = strstr(at + 1, folder))
    length = (size_t)(at - source) + sizeof folder - 1;
  return length;
}

/* Pushes the position of the innermost function of Lua that is not the library's: who passed the
 * option. A caller that is gone by a tail call is passed over, as are functions of C. */
static void push_position(lua_State *L) {
  lua_Debug ar;
  char prefix[512];
  size_t length;
  if (!lua_getstack(L, 1, &ar) || !lua_getinfo(L, "S", &ar)) {
    lua_pushliteral(L, "");
    return;
  }
  length = own_prefix(ar.source);
  if (length == 0 || length > sizeof prefix) {
    luaL_where(L, 1);
    return;
  }
  memcpy(prefix, ar.source, length);
  for (int level = 2; lua_getstack(L, level, &ar) && lua_getinfo(L, "Sl", &ar); level++) {
    if (ar.currentline <= 0 || strncmp(ar.source, prefix, length) == 0) continue;
    luaL_where(L, level);
    return;
  }
  luaL_where(L, 1);
}

static int option_error(lua_State *L, const char *format, ...) {
  va_list arguments;
  push_position(L);
  va_start(arguments, format);
  lua_pushvfstring(L, format, arguments);
  va_end(arguments);
  lua_concat(L, 2);
  return lua_error(L);
}

/* ---- reading; the value is on top of the stack ---- */

static int wrong_type(lua_State *L, const char *name, const char *wanted) {
  return option_error(L, "option '%s': %s expected, got %s", name, wanted, luaL_typename(L, -1));
}

static amqp_bytes_t read_shortstr(lua_State *L, const char *name) {
  size_t len;
  const char *s;
  if (lua_type(L, -1) != LUA_TSTRING) wrong_type(L, name, "string");
  s = lua_tolstring(L, -1, &len);
  if (len > 255) option_error(L, "option '%s': longer than 255 bytes", name);
  return mrl_bytes(s, len);
}

static bool read_boolean(lua_State *L, const char *name) {
  if (lua_type(L, -1) != LUA_TBOOLEAN) wrong_type(L, name, "boolean");
  return lua_toboolean(L, -1);
}

static uint64_t read_integer(lua_State *L, const char *name, int64_t min, int64_t max) {
  int64_t n = 0;
  if (lua_type(L, -1) != LUA_TNUMBER) wrong_type(L, name, "number");
  if (!mr_exact_integer(L, -1, &n)) option_error(L, "option '%s': not an integer", name);
  if (n < min || n > max) option_error(L, "option '%s': out of range", name);
  return (uint64_t)n;
}

static amqp_bytes_t read_expiration(lua_State *L, const char *name, char *text, size_t room) {
  if (lua_type(L, -1) == LUA_TSTRING) return read_shortstr(L, name);
  if (lua_type(L, -1) != LUA_TNUMBER) wrong_type(L, name, "string or number of milliseconds");
  uint64_t ms = read_integer(L, name, 0, UINT32_MAX);
  int n = snprintf(text, room, "%llu", (unsigned long long)ms);
  return mrl_bytes(text, (size_t)n);
}

static uint64_t read_timestamp(lua_State *L, const char *name) {
  uint64_t n;
  if (lua_type(L, -1) == LUA_TUSERDATA && mrl_typed_timestamp(L, -1, &n)) return n;
  return read_integer(L, name, 0, INT64_MAX);
}

static void read_property(lua_State *L, int which, mrl_options *out) {
  const option *opt = &OPTIONS[which];
  const char *name = NAMES[which];
  amqp_basic_properties_t *props = &out->props;
  props->_flags |= opt->flag;
  switch (opt->kind) {
    case OPT_STRING:
      *(amqp_bytes_t *)(void *)((char *)props + opt->offset) = read_shortstr(L, name);
      return;
    case OPT_HEADERS: mrl_to_table(L, -1, name, false, &props->headers); return;
    case OPT_DELIVERY_MODE: props->delivery_mode = (uint8_t)read_integer(L, name, 1, 2); return;
    case OPT_PRIORITY: props->priority = (uint8_t)read_integer(L, name, 0, 255); return;
    case OPT_TIMESTAMP: props->timestamp = read_timestamp(L, name); return;
    default: props->expiration = read_expiration(L, name, out->expiration, sizeof out->expiration);
  }
}

static void read_option(lua_State *L, int which, mrl_options *out) {
  const char *name = NAMES[which];
  switch (OPTIONS[which].kind) {
    case OPT_KEY: out->routing_key = read_shortstr(L, name); return;
    case OPT_EXCHANGE: out->exchange = read_shortstr(L, name); return;
    case OPT_MANDATORY: out->mandatory = read_boolean(L, name); return;
    case OPT_PERSISTENT: out->persistent = read_boolean(L, name); return;
    case OPT_TIMEOUT: /* for the layer above */
      if (lua_type(L, -1) != LUA_TNUMBER) wrong_type(L, name, "number");
      return;
    default: read_property(L, which, out);
  }
}

static int unknown_option(lua_State *L) {
  if (lua_type(L, -2) != LUA_TSTRING)
    return option_error(L, "the name of an option must be a string, got %s", luaL_typename(L, -2));
  return option_error(L, "unknown option '%s'", lua_tostring(L, -2));
}

static void read_table(lua_State *L, mrl_state *st, int i, mrl_options *out) {
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    int which = -1;
    if (lua_type(L, -2) == LUA_TSTRING)
      which = mrl_find_key(st, lua_tostring(L, -2), 0, NAMES, N_OPTIONS);
    if (which < 0) {
      unknown_option(L);
      return;
    }
    read_option(L, which, out);
  }
}

void mrl_read_options(lua_State *L, mrl_state *st, int i, bool confirm, mrl_options *out) {
  out->exchange = out->routing_key = mrl_bytes("", 0);
  out->mandatory = out->persistent = confirm;
  out->props._flags = 0;
  mrl_arena_reset(&st->arena);
  if (lua_type(L, i) == LUA_TTABLE)
    read_table(L, st, i, out);
  else if (!lua_isnoneornil(L, i))
    option_error(L, "publish: opts: table expected, got %s", luaL_typename(L, i));
  if (!(out->props._flags & AMQP_BASIC_DELIVERY_MODE_FLAG) && out->persistent) {
    out->props._flags |= AMQP_BASIC_DELIVERY_MODE_FLAG;
    out->props.delivery_mode = AMQP_DELIVERY_PERSISTENT;
  }
}

/* ---- encoding ---- */

static mr_status encode_large(mrl_state *st, const mrl_options *o, amqp_bytes_t *out) {
  for (size_t room = 8 * MR_PROPS_ROOM; room <= (size_t)1 << 28; room *= 4) {
    uint8_t *bytes = mrl_scratch(st, room);
    if (!bytes) return MR_NO_MEMORY;
    long n = mr_props_encode_to(&o->props, bytes, room);
    if (n == MR_TOO_LARGE) continue;
    if (n < 0) return (mr_status)n;
    *out = mrl_bytes(bytes, (size_t)n);
    return MR_OK;
  }
  return MR_TOO_LARGE;
}

mr_status mrl_encode_props(mrl_state *st, const mrl_options *o, uint8_t *room, amqp_bytes_t *out) {
  amqp_flags_t flags = o->props._flags;
  if (flags == 0) {
    *out = mrl_bytes(NULL, 0);
    return MR_OK;
  }
  if (flags == AMQP_BASIC_DELIVERY_MODE_FLAG) {
    room[0] = AMQP_BASIC_DELIVERY_MODE_FLAG >> 8;
    room[1] = 0;
    room[2] = o->props.delivery_mode;
    *out = mrl_bytes(room, 3);
    return MR_OK;
  }
  long n = mr_props_encode_to(&o->props, room, MR_PROPS_ROOM);
  if (n == MR_TOO_LARGE) return encode_large(st, o, out);
  if (n < 0) return (mr_status)n;
  *out = mrl_bytes(room, (size_t)n);
  return MR_OK;
}

/* ---- raw properties as a table ---- */

/* Leaves the headers out when the publish number of this library was all there was in them. */
static void push_headers(lua_State *L, const amqp_table_t *headers) {
  mrl_push_table(L, headers, MR_SEQ_HEADER);
  lua_pushnil(L);
  bool empty = !lua_next(L, -2);
  if (!empty) lua_pop(L, 2);
  if (!empty || headers->num_entries == 0) return;
  lua_pop(L, 1);
  lua_pushnil(L);
}

static void push_property(lua_State *L, const amqp_basic_properties_t *props, const option *opt) {
  switch (opt->kind) {
    case OPT_HEADERS: push_headers(L, &props->headers); return;
    case OPT_DELIVERY_MODE: lua_pushinteger(L, props->delivery_mode); return;
    case OPT_PRIORITY: lua_pushinteger(L, props->priority); return;
    case OPT_TIMESTAMP: mrl_push_uint64(L, props->timestamp); return;
    default:
      mrl_push_bytes(L, *(const amqp_bytes_t *)(const void *)((const char *)props + opt->offset));
  }
}

void mrl_push_properties(lua_State *L, amqp_bytes_t raw) {
  mrl_state *st = mrl_get_state(L);
  amqp_basic_properties_t *props;
  if (raw.len == 0) {
    lua_newtable(L);
    return;
  }
  amqp_pool_t *pool = mrl_pool_acquire(L, st);
  if (mr_props_decode(raw, pool, &props) != MR_OK) {
    mrl_pool_release(st, pool);
    luaL_error(L, "cannot decode the properties");
    return;
  }
  lua_newtable(L);
  for (int i = 0; i < N_OPTIONS; i++) {
    if (!(props->_flags & OPTIONS[i].flag)) continue;
    push_property(L, props, &OPTIONS[i]);
    lua_setfield(L, -2, NAMES[i]);
  }
  mrl_pool_release(st, pool);
  lua_remove(L, -2); /* what mrl_pool_acquire pushed */
}

/* ---- dropping properties, byte for byte ---- */

/* Length of the property of this flag at `p`. Short strings but for headers and four numbers. */
static size_t property_size(const uint8_t *p, unsigned flag) {
  switch (flag) {
    case AMQP_BASIC_HEADERS_FLAG:
      return 4 + ((size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3]);
    case AMQP_BASIC_DELIVERY_MODE_FLAG:
    case AMQP_BASIC_PRIORITY_FLAG: return 1;
    case AMQP_BASIC_TIMESTAMP_FLAG: return 8;
    default: return 1 + (size_t)p[0];
  }
}

size_t mrl_strip_props(amqp_bytes_t raw, amqp_flags_t without, uint8_t *out) {
  const uint8_t *p = raw.bytes;
  uint8_t *to = out + 2;
  if (raw.len < 2) return 0;
  unsigned flags = (unsigned)p[0] << 8 | p[1];
  unsigned kept = flags & ~(unsigned)without;
  out[0] = (uint8_t)(kept >> 8);
  out[1] = (uint8_t)kept;
  p += 2;
  for (unsigned flag = 1u << 15; flag >= AMQP_BASIC_CLUSTER_ID_FLAG; flag >>= 1) {
    if (!(flags & flag)) continue;
    size_t size = property_size(p, flag);
    if (kept & flag) {
      memcpy(to, p, size);
      to += size;
    }
    p += size;
  }
  return (size_t)(to - out);
}
