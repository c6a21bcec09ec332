/* TLS contexts: the options table, checked. */
#include <string.h>

#include "lua/net_bind.h"

typedef struct {
  mrn_tls_context *context; /* NULL: collected */
} holder;

mrn_tls_context *mrn_opt_tls(lua_State *L, int index) {
  if (lua_isnoneornil(L, index)) return NULL;
  holder *h = luaL_checkudata(L, index, MRN_TLS_TYPE);
  luaL_argcheck(L, h->context != NULL, index, "this TLS context was collected");
  return h->context;
}

static const char *text_option(lua_State *L, const char *name) {
  lua_getfield(L, 1, name);
  const char *text = NULL;
  if (!lua_isnil(L, -1)) {
    if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "tls.%s: a string expected", name);
    text = lua_tostring(L, -1);
    if (strlen(text) != lua_rawlen(L, -1)) luaL_error(L, "tls.%s holds a NUL byte", name);
  }
  lua_pop(L, 1); /* the options table keeps the string */
  return text;
}

static bool verify_option(lua_State *L) {
  lua_getfield(L, 1, "verify");
  if (!lua_isnil(L, -1) && !lua_isboolean(L, -1)) {
    luaL_error(L, "tls.verify: a boolean expected");
  }
  bool verify = lua_isnil(L, -1) || lua_toboolean(L, -1);
  lua_pop(L, 1);
  return verify;
}

static int version_option(lua_State *L) {
  lua_getfield(L, 1, "min_version");
  const char *version = lua_isnil(L, -1) ? "1.2" : lua_tostring(L, -1);
  int number = 0;
  if (version != NULL && strcmp(version, "1.2") == 0) number = 12;
  if (version != NULL && strcmp(version, "1.3") == 0) number = 13;
  if (number == 0) luaL_error(L, "tls.min_version: \"1.2\" or \"1.3\" expected");
  lua_pop(L, 1);
  return number;
}

/* `server_name` belongs to a connection, not to the context: known, and left to net.connect. */
static void refuse_unknown(lua_State *L) {
  static const char *const names[] = {"ca",          "cert",        "key", "verify",
                                      "min_version", "server_name", NULL};
  lua_pushnil(L);
  while (lua_next(L, 1) != 0) {
    lua_pop(L, 1);
    int i = 0;
    const char *name = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : "?";
    while (names[i] != NULL && strcmp(names[i], name) != 0) i++;
    if (names[i] == NULL) luaL_error(L, "unknown option tls.%s", name);
  }
}

static int tls(lua_State *L) {
  mrn_error err;
  mrn_tls_options options;
  if (lua_isnoneornil(L, 1)) {
    lua_settop(L, 0);
    lua_newtable(L);
  }
  luaL_checktype(L, 1, LUA_TTABLE);
  refuse_unknown(L);
  options.ca = text_option(L, "ca");
  options.cert = text_option(L, "cert");
  options.key = text_option(L, "key");
  options.verify = verify_option(L);
  options.min_version = version_option(L);
  holder *h = lua_newuserdata(L, sizeof *h);
  h->context = NULL;
  luaL_getmetatable(L, MRN_TLS_TYPE);
  lua_setmetatable(L, -2);
  h->context = mrn_tls_context_new(&options, &err);
  if (h->context != NULL) return 1;
  lua_pushnil(L);
  lua_pushstring(L, err.text);
  return 2;
}

static int collect(lua_State *L) {
  holder *h = luaL_checkudata(L, 1, MRN_TLS_TYPE);
  mrn_tls_context_free(h->context);
  h->context = NULL;
  return 0;
}

void mrn_bind_tls(lua_State *L) {
  static const luaL_Reg methods[] = {{"__gc", collect}, {NULL, NULL}};
  mr_new_type(L, MRN_TLS_TYPE, methods);
  lua_pushcfunction(L, tls);
  lua_setfield(L, -2, "tls");
}
