/*
 * One C source for Lua 5.1, 5.2, 5.3, 5.4 and LuaJIT. The 5.1 binary is built against PUC Lua 5.1's
 * headers and runs in LuaJIT as well, so it may use nothing that either of the two lacks.
 * Everything here is static: nothing is exported but the luaopen function (MR_EXPORT).
 */
#ifndef MOONRABBIT_COMPAT_H
#define MOONRABBIT_COMPAT_H

#include <lauxlib.h>
#include <lua.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define MR_EXPORT __attribute__((visibility("default")))
#define MR_UNUSED __attribute__((unused))
#define MR_LIKELY(x) __builtin_expect(!!(x), 1)
#define MR_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define MR_EXPORT
#define MR_UNUSED
#define MR_LIKELY(x) (x)
#define MR_UNLIKELY(x) (x)
#endif

/* Whether lua_Integer values are a subtype of their own (5.3 and later). Elsewhere every number is
 * a double, and integers are exact up to 2^53 only. */
#if LUA_VERSION_NUM >= 503
#define MR_HAS_INTEGERS 1
#else
#define MR_HAS_INTEGERS 0
#endif
#define MR_EXACT_INTEGER ((int64_t)1 << 53)

#if LUA_VERSION_NUM == 501

#define MR_rawlen(L, i) lua_objlen(L, i)

MR_UNUSED static int mr_absindex(lua_State *L, int i) {
  return i > 0 || i <= LUA_REGISTRYINDEX ? i : lua_gettop(L) + i + 1;
}

MR_UNUSED static void mr_setfuncs(lua_State *L, const luaL_Reg *l, int nup) {
  luaL_checkstack(L, nup + 1, "too many upvalues");
  for (; l->name != NULL; l++) {
    for (int i = 0; i < nup; i++) lua_pushvalue(L, -nup);
    lua_pushcclosure(L, l->func, nup);
    lua_setfield(L, -(nup + 2), l->name);
  }
  lua_pop(L, nup);
}

#define mr_checkversion(L) ((void)(L))

#else

#define MR_rawlen(L, i) lua_rawlen(L, i)
#define mr_absindex(L, i) lua_absindex(L, i)
#define mr_setfuncs(L, l, nup) luaL_setfuncs(L, l, nup)
#define mr_checkversion(L) luaL_checkversion(L)

#endif

#define mr_rawlen(L, i) ((size_t)MR_rawlen(L, i))

/* Pushes a new table with the functions of `l` (no upvalues). */
MR_UNUSED static void mr_newlib(lua_State *L, const luaL_Reg *l) {
  lua_newtable(L);
  mr_setfuncs(L, l, 0);
}

/* The userdata at `i` if its metatable is the registry's `name`, else NULL. */
MR_UNUSED static void *mr_testudata(lua_State *L, int i, const char *name) {
  void *p = lua_touserdata(L, i);
  if (p == NULL || !lua_getmetatable(L, i)) return NULL;
  lua_getfield(L, LUA_REGISTRYINDEX, name);
  if (!lua_rawequal(L, -1, -2)) p = NULL;
  lua_pop(L, 2);
  return p;
}

/* Pushes the registry metatable `name`, made on first use with __name. Returns 1 when new. */
MR_UNUSED static int mr_newmetatable(lua_State *L, const char *name) {
  if (!luaL_newmetatable(L, name)) return 0;
  lua_pushstring(L, name);
  lua_setfield(L, -2, "__name");
  return 1;
}

/* Pops a table and keeps it with the userdata at `i`, which keeps it alive. Always a table: 5.1 (an
 * environment) and 5.2 take nothing else. */
MR_UNUSED static void mr_setuservalue(lua_State *L, int i) {
#if LUA_VERSION_NUM >= 504
  lua_setiuservalue(L, i, 1);
#elif LUA_VERSION_NUM >= 502
  lua_setuservalue(L, i);
#else
  lua_setfenv(L, i);
#endif
}

/* Pushes what mr_setuservalue kept. Before that: nil, or some table on 5.1. */
MR_UNUSED static void mr_getuservalue(lua_State *L, int i) {
#if LUA_VERSION_NUM >= 504
  lua_getiuservalue(L, i, 1);
#elif LUA_VERSION_NUM >= 502
  lua_getuservalue(L, i);
#else
  lua_getfenv(L, i);
#endif
}

/* The number at `i` as an exact 64-bit integer; 0 when it is not an integral number that fits. */
MR_UNUSED static int mr_tointeger(lua_State *L, int i, int64_t *out) {
  lua_Number n;
  if (lua_type(L, i) != LUA_TNUMBER) return 0;
#if MR_HAS_INTEGERS
  if (lua_isinteger(L, i)) {
    *out = (int64_t)lua_tointeger(L, i);
    return 1;
  }
#endif
  n = lua_tonumber(L, i);
  if (!(n >= -9223372036854775808.0 && n < 9223372036854775808.0)) return 0;
  if ((lua_Number)(int64_t)n != n) return 0;
  *out = (int64_t)n;
  return 1;
}

#endif
