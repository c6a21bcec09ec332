/* Sessions through the binding: what a broker may send, from the bytes to Lua's values (lua_session.lua). */
#include <lauxlib.h>
#include <lualib.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int luaopen_moonrabbit_core(lua_State *L);

static lua_State *L;

static int traceback(lua_State *state) {
  luaL_traceback(state, state, luaL_tolstring(state, 1, NULL), 1);
  return 1;
}

static void fail(void) {
  fprintf(stderr, "%s\n", lua_tostring(L, -1));
  abort();
}

/* Runs from the top of the checkout, as scripts/fuzz does. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  L = luaL_newstate();
  luaL_openlibs(L);
  luaL_requiref(L, "moonrabbit.core", luaopen_moonrabbit_core, 0);
  if (luaL_dostring(L, "package.path = './?.lua;' .. package.path")) fail();
  lua_settop(L, 0);
  lua_pushcfunction(L, traceback);
  if (luaL_dofile(L, "spec/fuzz/lua_session.lua")) fail();
  return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size > 1 << 14) return 0;
  lua_pushvalue(L, 2);
  lua_pushlstring(L, (const char *)data, size);
  if (lua_pcall(L, 1, 0, 1)) fail();
  lua_gc(L, LUA_GCCOLLECT, 0); /* or libFuzzer looks for a leak after each input */
  return 0;
}
