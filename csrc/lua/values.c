/* Lua tables to AMQP tables and back. */
#include <math.h>

#include "lua/binding.h"

/* Where in a nested table we are, for error messages. */
typedef struct path {
  const struct path *up;
  const char *key; /* NULL: an element of an array */
  int index;
} path;

typedef struct {
  lua_State *L;
  mrl_state *st;
  bool arguments;
} encoder;

static void encode_value(encoder *e, int i, const path *at, int depth, amqp_field_value_t *out);

static void push_path(lua_State *L, const path *at) {
  if (!at->up) {
    lua_pushstring(L, at->key);
    return;
  }
  push_path(L, at->up);
  if (at->key)
    lua_pushfstring(L, ".%s", at->key);
  else
    lua_pushfstring(L, "[%d]", at->index);
  lua_concat(L, 2);
}

/* Throws "<path>: <what>". */
static void fail(encoder *e, const path *at, const char *what) {
  luaL_checkstack(e->L, 10, NULL);
  push_path(e->L, at);
  luaL_error(e->L, "%s: %s", lua_tostring(e->L, -1), what);
}

/* ---- tables ---- */

/* The length of an array, 0 for a map. Throws when the table is neither. */
static int array_length(encoder *e, int i, const path *at) {
  lua_State *L = e->L;
  size_t strings = 0, numbers = 0;
  size_t n = lua_rawlen(L, i);
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    int64_t key;
    int type = lua_type(L, -2);
    if (type == LUA_TSTRING)
      strings++;
    else if (type == LUA_TNUMBER && mr_exact_integer(L, -2, &key) && key >= 1 && (uint64_t)key <= n)
      numbers++;
    else if (type == LUA_TNUMBER)
      fail(e, at, "an array must be a sequence from 1 without holes");
    else
      fail(e, at, lua_pushfstring(L, "a key cannot be a %s", lua_typename(L, type)));
  }
  if (strings && numbers) fail(e, at, "a table must have string keys or be an array, not both");
  if (numbers != n && numbers) fail(e, at, "an array must be a sequence from 1 without holes");
  if (numbers > INT32_MAX || strings > INT32_MAX) fail(e, at, "too many entries");
  return (int)numbers;
}

static amqp_table_entry_t *more_entries(encoder *e, const amqp_table_t *table, int *room) {
  int grown = *room ? *room * 2 : 8;
  amqp_table_entry_t *entries =
      mrl_arena_alloc(e->L, &e->st->arena, (size_t)grown * sizeof *entries);
  if (table->num_entries)
    memcpy(entries, table->entries, (size_t)table->num_entries * sizeof *entries);
  *room = grown;
  return entries;
}

static void encode_map(encoder *e, int i, const path *at, int depth, amqp_table_t *out) {
  lua_State *L = e->L;
  int room = 0;
  out->num_entries = 0;
  out->entries = NULL;
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    size_t len;
    if (out->num_entries == room) out->entries = more_entries(e, out, &room);
    amqp_table_entry_t *entry = &out->entries[out->num_entries];
    path below = {at, NULL, 0};
    below.key = lua_tolstring(L, -2, &len); /* array_length saw that it is a string */
    if (len > 255) fail(e, at, "a name is longer than 255 bytes");
    entry->key = mrl_bytes(below.key, len);
    encode_value(e, lua_gettop(L), &below, depth, &entry->value);
    out->num_entries++;
  }
}

static void encode_array(encoder *e, int i, int n, const path *at, int depth, amqp_array_t *out) {
  lua_State *L = e->L;
  out->num_entries = n;
  out->entries = mrl_arena_alloc(L, &e->st->arena, (size_t)n * sizeof *out->entries);
  for (int k = 1; k <= n; k++) {
    path below = {at, NULL, k};
    lua_rawgeti(L, i, k);
    encode_value(e, lua_gettop(L), &below, depth, &out->entries[k - 1]);
    lua_pop(L, 1);
  }
}

static void encode_table(encoder *e, int i, const path *at, int depth, amqp_field_value_t *out) {
  if (depth > MR_MAX_NESTING) fail(e, at, "nested too deep, or within itself");
  luaL_checkstack(e->L, 12, "table nested too deep");
  int n = array_length(e, i, at);
  if (n) {
    out->kind = AMQP_FIELD_KIND_ARRAY;
    encode_array(e, i, n, at, depth, &out->value.array);
  } else {
    out->kind = AMQP_FIELD_KIND_TABLE;
    encode_map(e, i, at, depth, &out->value.table);
  }
}

/* ---- scalars ---- */

static void encode_integer(int64_t n, amqp_field_value_t *out) {
  if (n >= INT32_MIN && n <= INT32_MAX) {
    out->kind = AMQP_FIELD_KIND_I32;
    out->value.i32 = (int32_t)n;
  } else {
    out->kind = AMQP_FIELD_KIND_I64;
    out->value.i64 = n;
  }
}

/* Whether an integral float stands for an integer: always where Lua has no integers, and in
 * arguments, where `60*1000/2` is meant as one. */
static bool is_integer(const encoder *e, int i, int64_t *n) {
  if (lua_isinteger(e->L, i)) return mr_exact_integer(e->L, i, n);
  if (MR_HAS_INTEGERS && !e->arguments) return false;
  return mr_exact_integer(e->L, i, n) && *n <= INT64_C(1) << 53 && *n >= -(INT64_C(1) << 53);
}

static void encode_number(encoder *e, int i, const path *at, amqp_field_value_t *out) {
  int64_t n;
  if (is_integer(e, i, &n)) {
    encode_integer(n, out);
    return;
  }
  lua_Number d = lua_tonumber(e->L, i);
  if (!isfinite(d)) fail(e, at, "not a finite number (types.double sends it)");
  out->kind = AMQP_FIELD_KIND_F64;
  out->value.f64 = d;
}

static void encode_userdata(encoder *e, int i, const path *at, amqp_field_value_t *out) {
  if (lua_touserdata(e->L, i) == e->st->null) {
    out->kind = AMQP_FIELD_KIND_VOID;
    return;
  }
  const mrl_typed *typed = mrl_test(e->L, i, MR_UP_TYPED);
  if (!typed) fail(e, at, "a userdata of another library cannot be sent");
  if (!mrl_typed_to_value(typed, out))
    fail(e, at, "out of range (a signed 64-bit integer is sent)");
}

static void encode_value(encoder *e, int i, const path *at, int depth, amqp_field_value_t *out) {
  lua_State *L = e->L;
  int type = lua_type(L, i);
  switch (type) {
    case LUA_TSTRING:
      out->kind = AMQP_FIELD_KIND_UTF8;
      out->value.bytes.bytes = (void *)(uintptr_t)lua_tolstring(L, i, &out->value.bytes.len);
      return;
    case LUA_TNUMBER: encode_number(e, i, at, out); return;
    case LUA_TBOOLEAN:
      out->kind = AMQP_FIELD_KIND_BOOLEAN;
      out->value.boolean = lua_toboolean(L, i);
      return;
    case LUA_TTABLE: encode_table(e, i, at, depth + 1, out); return;
    case LUA_TUSERDATA: encode_userdata(e, i, at, out); return;
    default: fail(e, at, lua_pushfstring(L, "a %s cannot be sent", lua_typename(L, type)));
  }
}

void mrl_to_table(lua_State *L, int i, const char *name, bool arguments, amqp_table_t *out) {
  encoder e = {L, mrl_get_state(L), arguments};
  path at = {NULL, name, 0};
  if (lua_type(L, i) != LUA_TTABLE)
    luaL_error(L, "%s: table expected, got %s", name, luaL_typename(L, i));
  luaL_checkstack(L, 12, NULL);
  i = lua_absindex(L, i);
  if (array_length(&e, i, &at)) fail(&e, &at, "its keys must be strings");
  encode_map(&e, i, &at, 1, out);
}

/* ---- and back ---- */

static void push_value(lua_State *L, const amqp_field_value_t *value);

void mrl_push_table(lua_State *L, const amqp_table_t *table, const char *hidden) {
  size_t hidden_len = hidden ? strlen(hidden) : 0;
  luaL_checkstack(L, 6, "table nested too deep");
  lua_createtable(L, 0, table->num_entries);
  for (int i = 0; i < table->num_entries; i++) {
    const amqp_table_entry_t *entry = &table->entries[i];
    if (hidden && entry->key.len == hidden_len && memcmp(entry->key.bytes, hidden, hidden_len) == 0)
      continue;
    mrl_push_bytes(L, entry->key);
    push_value(L, &entry->value);
    lua_rawset(L, -3);
  }
}

static void push_array(lua_State *L, const amqp_array_t *array) {
  luaL_checkstack(L, 6, "array nested too deep");
  lua_createtable(L, array->num_entries, 0);
  for (int i = 0; i < array->num_entries; i++) {
    push_value(L, &array->entries[i]);
    lua_rawseti(L, -2, i + 1);
  }
}

/* Never rounded: what this Lua cannot hold becomes a Typed. */
static void push_int64(lua_State *L, const amqp_field_value_t *value) {
  int64_t n = value->value.i64;
  bool exact = MR_HAS_INTEGERS || (n <= INT64_C(1) << 53 && n >= -(INT64_C(1) << 53));
  if (value->kind == AMQP_FIELD_KIND_U64 && n < 0) exact = false;
  if (exact)
    mr_push_int64(L, n);
  else
    mrl_push_typed(L, value);
}

static void push_value(lua_State *L, const amqp_field_value_t *value) {
  switch (value->kind) {
    case AMQP_FIELD_KIND_BOOLEAN: lua_pushboolean(L, value->value.boolean != 0); return;
    case AMQP_FIELD_KIND_I8: lua_pushinteger(L, value->value.i8); return;
    case AMQP_FIELD_KIND_U8: lua_pushinteger(L, value->value.u8); return;
    case AMQP_FIELD_KIND_I16: lua_pushinteger(L, value->value.i16); return;
    case AMQP_FIELD_KIND_U16: lua_pushinteger(L, value->value.u16); return;
    case AMQP_FIELD_KIND_I32: lua_pushinteger(L, value->value.i32); return;
    case AMQP_FIELD_KIND_U32: mr_push_int64(L, value->value.u32); return;
    case AMQP_FIELD_KIND_I64:
    case AMQP_FIELD_KIND_U64: push_int64(L, value); return;
    case AMQP_FIELD_KIND_TIMESTAMP: mrl_push_uint64(L, value->value.u64); return;
    case AMQP_FIELD_KIND_F32: lua_pushnumber(L, (lua_Number)value->value.f32); return;
    case AMQP_FIELD_KIND_F64: lua_pushnumber(L, (lua_Number)value->value.f64); return;
    case AMQP_FIELD_KIND_DECIMAL: mrl_push_typed(L, value); return;
    case AMQP_FIELD_KIND_UTF8:
    case AMQP_FIELD_KIND_BYTES: mrl_push_bytes(L, value->value.bytes); return;
    case AMQP_FIELD_KIND_TABLE: mrl_push_table(L, &value->value.table, NULL); return;
    case AMQP_FIELD_KIND_ARRAY: push_array(L, &value->value.array); return;
    default: lua_pushvalue(L, lua_upvalueindex(MR_UP_NULL));
  }
}

/* ---- core.encode_table, core.decode_table ---- */

/* Encodes the table at 1 into `room` bytes of a new userdata; pushes the string. The memory comes
 * first: allocating it may run finalizers, which may use the arena. */
static bool encode_into(lua_State *L, mrl_state *st, bool arguments, size_t room) {
  amqp_table_t table;
  size_t used = 0;
  void *bytes = lua_newuserdata(L, room);
  mrl_arena_reset(&st->arena);
  mrl_to_table(L, 1, "table", arguments, &table);
  if (mr_table_depth_ok(&table) != MR_OK) luaL_error(L, "table: nested too deep");
  if (amqp_encode_table(mrl_bytes(bytes, room), &table, &used) != AMQP_STATUS_OK) return false;
  lua_pushlstring(L, bytes, used);
  return true;
}

int mrl_encode_table(lua_State *L) {
  bool arguments = mrl_opt_boolean(L, 2, false);
  for (size_t room = 512; room <= (size_t)1 << 28; room *= 4) {
    if (encode_into(L, mrl_get_state(L), arguments, room)) return 1;
    lua_pop(L, 1);
  }
  return luaL_error(L, "table: too large");
}

int mrl_decode_table(lua_State *L) {
  mrl_state *st = mrl_get_state(L);
  amqp_bytes_t bytes = mrl_check_string(L, 1);
  const char *wrong = bytes.len < 4 ? "too short" : mr_table_check(bytes);
  amqp_table_t table;
  size_t used = 0;
  if (wrong) return luaL_argerror(L, 1, wrong);
  amqp_pool_t *pool = mrl_pool_acquire(L, st);
  int status = amqp_decode_table(bytes, pool, &table, &used);
  if (status == AMQP_STATUS_OK) mrl_push_table(L, &table, NULL);
  mrl_pool_release(st, pool);
  if (status != AMQP_STATUS_OK) return luaL_error(L, "cannot decode the table");
  return 1;
}
