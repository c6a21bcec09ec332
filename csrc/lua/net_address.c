/* Addresses, and looking names up. */
#include "lua/net_bind.h"
#include "net/resolve.h"

void mrn_push_address(lua_State *L, const mrn_address *address) {
  mrn_address *copy = lua_newuserdata(L, sizeof *copy);
  *copy = *address;
  luaL_getmetatable(L, MRN_ADDRESS_TYPE);
  lua_setmetatable(L, -2);
}

static int address_tostring(lua_State *L) {
  char text[MRN_ADDRESS_TEXT];
  mrn_address_format(luaL_checkudata(L, 1, MRN_ADDRESS_TYPE), text);
  lua_pushstring(L, text);
  return 1;
}

static int unix_address(lua_State *L) {
  mrn_address address;
  mrn_error err;
  size_t length;
  const char *path = luaL_checklstring(L, 1, &length);
  mrn_status status = mrn_address_unix(path, length, &address, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  mrn_push_address(L, &address);
  return 1;
}

/* ---- Resolver ---- */

typedef struct {
  mrn_lookup *lookup; /* NULL: closed */
} resolver;

static int resolve(lua_State *L) {
  mrn_error err;
  const char *host = mrn_check_text(L, 1);
  int port = mrn_check_port(L, 2);
  resolver *r = lua_newuserdata(L, sizeof *r);
  r->lookup = NULL;
  luaL_getmetatable(L, MRN_RESOLVER_TYPE);
  lua_setmetatable(L, -2);
  r->lookup = mrn_lookup_start(host, port, &err);
  if (r->lookup != NULL) return 1;
  lua_pushnil(L);
  lua_pushstring(L, err.text);
  lua_pushboolean(L, err.temporary);
  return 3;
}

static int resolver_fd(lua_State *L) {
  const resolver *r = luaL_checkudata(L, 1, MRN_RESOLVER_TYPE);
  lua_pushinteger(L, r->lookup == NULL ? -1 : mrn_lookup_fd(r->lookup));
  return 1;
}

static int resolver_result(lua_State *L) {
  resolver *r = luaL_checkudata(L, 1, MRN_RESOLVER_TYPE);
  const mrn_address *addresses = NULL;
  size_t count = 0;
  mrn_error err;
  mrn_status status;
  if (r->lookup == NULL)
    status = mrn_fail(&err, MRN_DNS, "closed");
  else
    status = mrn_lookup_result(r->lookup, &addresses, &count, &err);
  if (status != MRN_OK) return mrn_push_failure(L, status, &err);
  lua_createtable(L, (int)count, 0);
  for (size_t i = 0; i < count; i++) {
    mrn_push_address(L, &addresses[i]);
    lua_rawseti(L, -2, (int)i + 1);
  }
  return 1;
}

static int resolver_close(lua_State *L) {
  resolver *r = luaL_checkudata(L, 1, MRN_RESOLVER_TYPE);
  mrn_lookup_free(r->lookup);
  r->lookup = NULL;
  return 0;
}

void mrn_bind_address(lua_State *L) {
  static const luaL_Reg address_methods[] = {{"__tostring", address_tostring}, {NULL, NULL}};
  static const luaL_Reg resolver_methods[] = {
      {"fd", resolver_fd},      {"result", resolver_result}, {"close", resolver_close},
      {"__gc", resolver_close}, {"__close", resolver_close}, {NULL, NULL}};
  static const luaL_Reg functions[] = {{"resolve", resolve}, {"unix", unix_address}, {NULL, NULL}};
  mr_new_type(L, MRN_ADDRESS_TYPE, address_methods);
  mr_new_type(L, MRN_RESOLVER_TYPE, resolver_methods);
  luaL_setfuncs(L, functions, 0);
}
