/* Any Lua table to the encoder: refused with an error, or encoded well-formed; and what was decoded
 * once is encoded and decoded again without change. */
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/moonrabbit.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int luaopen_moonrabbit_core(lua_State *L);

enum { MOST_ENTRIES = 6, AT_MODULE = 1, AT_TYPES = 2 };

static lua_State *L;

typedef struct {
  const uint8_t *p, *end;
} input;

static uint8_t take(input *in) { return in->p < in->end ? *in->p++ : 0; }

static uint64_t take64(input *in) {
  uint64_t n = 0;
  for (int i = 0; i < 8; i++) n = n << 8 | take(in);
  return n;
}

static void push_string(input *in) {
  size_t n = take(in), left = (size_t)(in->end - in->p);
  if (n > left) n = left;
  lua_pushlstring(L, (const char *)in->p, n);
  in->p += n;
}

static void push_double(input *in) {
  uint64_t bits = take64(in);
  double d;
  memcpy(&d, &bits, sizeof d);
  lua_pushnumber(L, d);
}

/* A typed value, or nil when its maker refuses the number. */
static void push_typed(input *in) {
  static const char *const names[] = {"int8",  "uint8", "int16",     "uint16", "int32",  "uint32",
                                      "int64", "float", "timestamp", "bytes",  "double", "decimal"};
  lua_getfield(L, AT_TYPES, names[take(in) % (sizeof names / sizeof *names)]);
  if (take(in) & 1)
    push_string(in);
  else
    lua_pushinteger(L, (lua_Integer)take64(in) >> take(in) % 64);
  lua_pushinteger(L, take(in));
  if (lua_pcall(L, 2, 1, 0)) {
    lua_pop(L, 1);
    lua_pushnil(L);
  }
}

static void push_value(input *in, int depth);

static void push_table(input *in, int depth) {
  luaL_checkstack(L, 8, NULL);
  lua_newtable(L);
  uint8_t kind = take(in);
  for (int i = 1 + kind / 2 % MOST_ENTRIES; i > 0; i--) {
    push_value(in, depth + 1);
    if (kind & 1) {
      lua_rawseti(L, -2, i);
      continue;
    }
    push_string(in);
    lua_insert(L, -2);
    lua_rawset(L, -3);
  }
  if (kind < 8) { /* a table that holds itself */
    lua_pushvalue(L, -1);
    lua_setfield(L, -2, "self");
  }
}

static void push_value(input *in, int depth) {
  switch (take(in) % 9) {
    case 0: lua_pushboolean(L, take(in) & 1); return;
    case 1: lua_pushinteger(L, (lua_Integer)take64(in)); return;
    case 2: push_double(in); return;
    case 3: push_typed(in); return;
    case 4: lua_getfield(L, AT_MODULE, "null"); return;
    case 5: lua_pushinteger(L, (int8_t)take(in)); return;
    case 6: push_string(in); return;
    default:
      if (depth < 40)
        push_table(in, depth);
      else
        lua_pushinteger(L, 1);
  }
}

/* Calls core.NAME with the value on top of the stack; false: it threw, and the stack is as before. */
static int call(const char *name, int is_arguments) {
  lua_getfield(L, AT_MODULE, name);
  lua_insert(L, -2);
  lua_pushboolean(L, is_arguments);
  if (!lua_pcall(L, 2, 1, 0)) return 1;
  if (!lua_tostring(L, -1) || !*lua_tostring(L, -1)) abort();
  lua_pop(L, 1);
  return 0;
}

static size_t checked_length(void) {
  size_t len;
  const char *bytes = lua_tolstring(L, -1, &len);
  const char *wrong = mr_table_check((amqp_bytes_t){len, (void *)(uintptr_t)bytes});
  if (wrong) {
    fprintf(stderr, "%s\n", wrong);
    abort();
  }
  return len;
}

/* The length of the table on top of the stack, decoded and encoded again; it takes its place. */
static size_t round_trip(void) {
  if (!call("decode_table", 0) || !call("encode_table", 0)) abort();
  return checked_length();
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  L = luaL_newstate();
  luaL_openlibs(L);
  luaL_requiref(L, "moonrabbit.core", luaopen_moonrabbit_core, 0);
  lua_getfield(L, AT_MODULE, "types");
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  input in = {data, data + size};
  int is_arguments = take(&in) & 1;
  push_table(&in, 0);
  if (call("encode_table", is_arguments)) {
    checked_length();
    size_t once = round_trip();
    if (round_trip() != once) abort();
  }
  lua_settop(L, AT_TYPES);
  lua_gc(L, LUA_GCCOLLECT, 0); /* or libFuzzer looks for a leak after each input */
  return 0;
}
