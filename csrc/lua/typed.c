/* Values with an exact wire type: moonrabbit.types.int64(1), types.timestamp(0), ... */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "lua/binding.h"

typedef struct {
  const char *name;
  char wire;
  int64_t min, max;
} type_info;

enum {
  T_TIMESTAMP,
  T_BYTES,
  T_DECIMAL,
  T_BOOLEAN,
  T_INT8,
  T_UINT8,
  T_INT16,
  T_UINT16,
  T_INT32,
  T_UINT32,
  T_INT64,
  T_UINT64,
  T_FLOAT,
  T_DOUBLE,
  T_COUNT
};

/* RabbitMQ knows no unsigned 64-bit type: uint64 travels as a signed one, if it fits. */
static const type_info TYPES[T_COUNT] = {
    {"timestamp", 'T', 0, INT64_MAX},
    {"bytes", 'x', 0, 0},
    {"decimal", 'D', 0, UINT32_MAX},
    {"boolean", 't', 0, 1},
    {"int8", 'b', INT8_MIN, INT8_MAX},
    {"uint8", 'B', 0, UINT8_MAX},
    {"int16", 's', INT16_MIN, INT16_MAX},
    {"uint16", 'u', 0, UINT16_MAX},
    {"int32", 'I', INT32_MIN, INT32_MAX},
    {"uint32", 'i', 0, UINT32_MAX},
    {"int64", 'l', INT64_MIN, INT64_MAX},
    {"uint64", 'l', 0, INT64_MAX},
    {"float", 'f', 0, 0},
    {"double", 'd', 0, 0},
};

static mrl_typed *check_typed(lua_State *L, int i) {
  return mrl_check(L, i, MR_UP_TYPED, MR_TYPED_TYPE);
}

static mrl_typed *new_typed(lua_State *L, int type, size_t extra) {
  mrl_typed *typed = lua_newuserdata(L, sizeof *typed + extra);
  memset(typed, 0, sizeof *typed);
  typed->type = (uint8_t)type;
  lua_pushvalue(L, lua_upvalueindex(MR_UP_TYPED));
  lua_setmetatable(L, -2);
  return typed;
}

/* ---- constructors ---- */

/* Digits in a string give every Lua exact 64-bit integers. */
static int64_t digits_to_integer(lua_State *L, const char *name) {
  const char *s = lua_tostring(L, 1);
  char *end;
  errno = 0;
  long long n = strtoll(s, &end, 10);
  if (end == s || *end != '\0') luaL_error(L, "types.%s: \"%s\" is not an integer", name, s);
  if (errno == ERANGE) luaL_error(L, "types.%s: %s is out of range", name, s);
  return n;
}

static int64_t check_integer(lua_State *L, const type_info *info) {
  int64_t n = 0;
  if (lua_type(L, 1) == LUA_TSTRING)
    n = digits_to_integer(L, info->name);
  else if (lua_type(L, 1) != LUA_TNUMBER)
    luaL_error(L, "types.%s: number expected, got %s", info->name, luaL_typename(L, 1));
  else if (!mr_exact_integer(L, 1, &n))
    luaL_error(L, "types.%s: %s is not an integer in range", info->name, lua_tostring(L, 1));
  if (n < info->min || n > info->max)
    luaL_error(L, "types.%s: %s is out of range", info->name, lua_tostring(L, 1));
  return n;
}

static int make_integer(lua_State *L, int type) {
  int64_t n = check_integer(L, &TYPES[type]);
  new_typed(L, type, 0)->v.i = n;
  return 1;
}

static int make_decimal(lua_State *L) {
  int64_t n = check_integer(L, &TYPES[T_DECIMAL]);
  uint64_t scale = lua_isnoneornil(L, 2) ? 0 : mrl_check_uint(L, 2, 255);
  mrl_typed *typed = new_typed(L, T_DECIMAL, 0);
  typed->v.i = n;
  typed->scale = (uint8_t)scale;
  return 1;
}

static int make_bytes(lua_State *L) {
  amqp_bytes_t b = mrl_check_string(L, 1);
  mrl_typed *typed = new_typed(L, T_BYTES, b.len);
  typed->v.len = b.len;
  memcpy(typed->bytes, b.bytes, b.len);
  return 1;
}

static int make_float(lua_State *L, int type) {
  if (lua_type(L, 1) != LUA_TNUMBER)
    luaL_error(L, "types.%s: number expected, got %s", TYPES[type].name, luaL_typename(L, 1));
  lua_Number n = lua_tonumber(L, 1);
  if (type == T_FLOAT && isfinite(n) && fabs(n) > 3.4028234663852886e38)
    luaL_error(L, "types.float: %s is out of range", lua_tostring(L, 1));
  new_typed(L, type, 0)->v.d = type == T_FLOAT ? (double)(float)n : n;
  return 1;
}

static int make_boolean(lua_State *L) {
  bool value = mrl_check_boolean(L, 1);
  new_typed(L, T_BOOLEAN, 0)->v.i = value;
  return 1;
}

/* One C function makes every type: upvalue MR_UP_COUNT + 1 says which. */
static int make(lua_State *L) {
  int type = (int)lua_tointeger(L, lua_upvalueindex(MR_UP_COUNT + 1));
  switch (type) {
    case T_BYTES: return make_bytes(L);
    case T_DECIMAL: return make_decimal(L);
    case T_BOOLEAN: return make_boolean(L);
    case T_FLOAT:
    case T_DOUBLE: return make_float(L, type);
    default: return make_integer(L, type);
  }
}

void mrl_push_types(lua_State *L, int first_upvalue) {
  lua_createtable(L, 0, T_COUNT);
  for (int type = 0; type < T_COUNT; type++) {
    for (int i = 0; i < MR_UP_COUNT; i++) lua_pushvalue(L, first_upvalue + i);
    lua_pushinteger(L, type);
    lua_pushcclosure(L, make, MR_UP_COUNT + 1);
    lua_setfield(L, -2, TYPES[type].name);
  }
}

/* ---- to and from the wire ---- */

bool mrl_typed_to_value(const mrl_typed *typed, amqp_field_value_t *out) {
  out->kind = (uint8_t)TYPES[typed->type].wire;
  switch (typed->type) {
    case T_BYTES: out->value.bytes = mrl_bytes(typed->bytes, typed->v.len); return true;
    case T_BOOLEAN: out->value.boolean = typed->v.i != 0; return true;
    case T_FLOAT: out->value.f32 = (float)typed->v.d; return true;
    case T_DOUBLE: out->value.f64 = typed->v.d; return true;
    case T_DECIMAL:
      out->value.decimal.decimals = typed->scale;
      out->value.decimal.value = (uint32_t)typed->v.i;
      return true;
    case T_INT8: out->value.i8 = (int8_t)typed->v.i; return true;
    case T_UINT8: out->value.u8 = (uint8_t)typed->v.i; return true;
    case T_INT16: out->value.i16 = (int16_t)typed->v.i; return true;
    case T_UINT16: out->value.u16 = (uint16_t)typed->v.i; return true;
    case T_INT32: out->value.i32 = (int32_t)typed->v.i; return true;
    case T_UINT32: out->value.u32 = (uint32_t)typed->v.i; return true;
    case T_TIMESTAMP: out->value.u64 = typed->v.u; return true;
    default: out->value.i64 = typed->v.i; return typed->type != T_UINT64 || typed->v.u <= INT64_MAX;
  }
}

void mrl_push_typed(lua_State *L, const amqp_field_value_t *value) {
  switch (value->kind) {
    case AMQP_FIELD_KIND_DECIMAL: {
      mrl_typed *typed = new_typed(L, T_DECIMAL, 0);
      typed->v.i = value->value.decimal.value;
      typed->scale = value->value.decimal.decimals;
      return;
    }
    case AMQP_FIELD_KIND_I64: new_typed(L, T_INT64, 0)->v.i = value->value.i64; return;
    default: new_typed(L, T_UINT64, 0)->v.u = value->value.u64;
  }
}

bool mrl_typed_timestamp(lua_State *L, int i, uint64_t *out) {
  const mrl_typed *typed = mrl_test(L, i, MR_UP_TYPED);
  if (!typed || typed->type != T_TIMESTAMP) return false;
  *out = typed->v.u;
  return true;
}

/* ---- what Lua sees ---- */

static lua_Number decimal_number(const mrl_typed *typed) {
  return (lua_Number)typed->v.i / pow(10.0, typed->scale);
}

static void push_value(lua_State *L, const mrl_typed *typed) {
  switch (typed->type) {
    case T_BYTES: lua_pushlstring(L, typed->bytes, typed->v.len); return;
    case T_BOOLEAN: lua_pushboolean(L, typed->v.i != 0); return;
    case T_FLOAT:
    case T_DOUBLE: lua_pushnumber(L, typed->v.d); return;
    case T_DECIMAL: lua_pushnumber(L, decimal_number(typed)); return;
    case T_UINT64: mrl_push_uint64(L, typed->v.u); return;
    default: mr_push_int64(L, typed->v.i);
  }
}

static int typed_index(lua_State *L) {
  const mrl_typed *typed = check_typed(L, 1);
  const char *key = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  if (strcmp(key, "value") == 0)
    push_value(L, typed);
  else if (strcmp(key, "type") == 0)
    lua_pushstring(L, TYPES[typed->type].name);
  else if (typed->type == T_DECIMAL && strcmp(key, "scale") == 0)
    lua_pushinteger(L, typed->scale);
  else if (typed->type == T_DECIMAL && strcmp(key, "unscaled") == 0)
    mr_push_int64(L, typed->v.i);
  else
    lua_pushnil(L);
  return 1;
}

static int typed_newindex(lua_State *L) { return luaL_error(L, "a typed value cannot be changed"); }

/* 1234 with scale 2 is "12.34". */
static void push_decimal_text(lua_State *L, const mrl_typed *typed) {
  char digits[300];
  int n = snprintf(digits, sizeof digits, "%0*" PRId64, typed->scale + 1, typed->v.i);
  lua_pushlstring(L, digits, (size_t)(n - typed->scale));
  if (typed->scale == 0) return;
  lua_pushliteral(L, ".");
  lua_pushlstring(L, digits + n - typed->scale, typed->scale);
  lua_concat(L, 3);
}

static int typed_tostring(lua_State *L) {
  const mrl_typed *typed = check_typed(L, 1);
  char text[40];
  switch (typed->type) {
    case T_BYTES: lua_pushlstring(L, typed->bytes, typed->v.len); return 1;
    case T_BOOLEAN: lua_pushstring(L, typed->v.i ? "true" : "false"); return 1;
    case T_DECIMAL: push_decimal_text(L, typed); return 1;
    case T_FLOAT: snprintf(text, sizeof text, "%.9g", typed->v.d); break;
    case T_DOUBLE: snprintf(text, sizeof text, "%.17g", typed->v.d); break;
    case T_UINT64: snprintf(text, sizeof text, "%" PRIu64, typed->v.u); break;
    default: snprintf(text, sizeof text, "%" PRId64, typed->v.i);
  }
  lua_pushstring(L, text);
  return 1;
}

static bool same(const mrl_typed *a, const mrl_typed *b) {
  if (a->type != b->type) return false;
  switch (a->type) {
    case T_BYTES: return a->v.len == b->v.len && memcmp(a->bytes, b->bytes, a->v.len) == 0;
    case T_FLOAT:
    case T_DOUBLE: return a->v.d == b->v.d;
    default: return a->v.i == b->v.i && a->scale == b->scale;
  }
}

static int typed_eq(lua_State *L) {
  const mrl_typed *a = mrl_test(L, 1, MR_UP_TYPED);
  const mrl_typed *b = mrl_test(L, 2, MR_UP_TYPED);
  lua_pushboolean(L, a && b && same(a, b));
  return 1;
}

const luaL_Reg mrl_typed_functions[] = {{"__index", typed_index},
                                        {"__newindex", typed_newindex},
                                        {"__tostring", typed_tostring},
                                        {"__eq", typed_eq},
                                        {NULL, NULL}};
