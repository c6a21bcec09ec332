/* The module moonrabbit.net (lua/moonrabbit/net.d.lua): the door, and what its parts share. */
#include <string.h>

#include "lua/net_bind.h"
#include "net/clock.h"

int mrn_push_failure(lua_State *L, mrn_status status, const mrn_error *err) {
  lua_pushnil(L);
  lua_pushstring(L, mrn_status_name(status));
  if (status == MRN_AGAIN || status == MRN_FULL) return 2;
  lua_pushstring(L, err->text);
  lua_pushboolean(L, err->temporary);
  return 4;
}

const char *mrn_check_text(lua_State *L, int index) {
  size_t length;
  const char *text = luaL_checklstring(L, index, &length);
  luaL_argcheck(L, strlen(text) == length, index, "a string without NUL bytes expected");
  return text;
}

int mrn_check_port(lua_State *L, int index) {
  lua_Integer port = luaL_checkinteger(L, index);
  luaL_argcheck(L, port >= 0 && port <= 65535, index, "a port is 0 to 65535");
  return (int)port;
}

static int now(lua_State *L) {
  lua_pushnumber(L, mrn_now());
  return 1;
}

MR_EXPORT int luaopen_moonrabbit_net(lua_State *L);
MR_EXPORT int luaopen_moonrabbit_net(lua_State *L) {
  luaL_checkversion(L);
  lua_createtable(L, 0, 16);
  lua_pushcfunction(L, now);
  lua_setfield(L, -2, "now");
  mrn_bind_address(L);
  mrn_bind_tls(L);
  mrn_bind_stream(L);
  mrn_bind_server(L);
  mrn_bind_poll(L);
  mrn_bind_alarm(L);
  mrn_bind_process(L);
  return 1;
}
