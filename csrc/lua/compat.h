/*
 * One C source for Lua 5.1, 5.2, 5.3, 5.4 and LuaJIT. What a version lacks is supplied here under
 * the name that later versions use; as static functions behind macros, so that no symbol that
 * starts with "lua" is ever exported.
 *
 * The 5.1 binary is built against PUC Lua's headers and loaded by LuaJIT too: it may use only what
 * PUC Lua 5.1 has.
 */
#ifndef MOONRABBIT_COMPAT_H
#define MOONRABBIT_COMPAT_H

#include <lauxlib.h>
#include <lua.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* What `require` looks up; everything else is hidden (-fvisibility=hidden). */
#if defined(_WIN32)
#define MR_EXPORT __declspec(dllexport)
#else
#define MR_EXPORT __attribute__((visibility("default")))
#endif
#define MR_UNUSED __attribute__((unused))
#define MR_LIKELY(x) __builtin_expect(!!(x), 1)
#define MR_UNLIKELY(x) __builtin_expect(!!(x), 0)

#if LUA_VERSION_NUM == 501

static MR_UNUSED int mr_absindex(lua_State *L, int index) {
  return index > 0 || index <= LUA_REGISTRYINDEX ? index : lua_gettop(L) + index + 1;
}

static MR_UNUSED void *mr_testudata(lua_State *L, int index, const char *type) {
  void *block = lua_touserdata(L, index);
  if (block == NULL || !lua_getmetatable(L, index)) return NULL;
  luaL_getmetatable(L, type);
  if (!lua_rawequal(L, -1, -2)) block = NULL;
  lua_pop(L, 2);
  return block;
}

static MR_UNUSED void mr_setfuncs(lua_State *L, const luaL_Reg *functions, int upvalues) {
  luaL_checkstack(L, upvalues + 1, "too many upvalues");
  for (; functions->name != NULL; functions++) {
    for (int i = 0; i < upvalues; i++) lua_pushvalue(L, -upvalues);
    lua_pushcclosure(L, functions->func, upvalues);
    lua_setfield(L, -(upvalues + 2), functions->name);
  }
  lua_pop(L, upvalues);
}

#define lua_absindex mr_absindex
#define luaL_testudata mr_testudata
#define luaL_setfuncs mr_setfuncs
#define lua_rawlen lua_objlen
#define luaL_newlibtable(L, l) lua_createtable(L, 0, (int)(sizeof(l) / sizeof((l)[0])) - 1)
#define luaL_newlib(L, l) (luaL_newlibtable(L, l), luaL_setfuncs(L, l, 0))
#define luaL_checkversion(L) ((void)(L))

#endif

/* Before 5.3 every number is a double, and integers are exact up to 2^53 only. */
#if LUA_VERSION_NUM < 503
#define MR_HAS_INTEGERS 0
#define lua_isinteger(L, index) ((void)(L), (void)(index), 0)
#else
#define MR_HAS_INTEGERS 1
#endif

/* The number at `index` as a 64-bit integer; 0 when it is none, or not an integral one that fits.
 * Strings are not converted. */
static MR_UNUSED int mr_exact_integer(lua_State *L, int index, int64_t *out) {
  lua_Number n;
  if (lua_type(L, index) != LUA_TNUMBER) return 0;
  if (lua_isinteger(L, index)) {
    *out = (int64_t)lua_tointeger(L, index);
    return 1;
  }
  n = lua_tonumber(L, index);
  if (!(n >= -9223372036854775808.0 && n < 9223372036854775808.0)) return 0;
  if ((lua_Number)(int64_t)n != n) return 0;
  *out = (int64_t)n;
  return 1;
}

/* Creates the metatable `type` with its __name and its methods; leaves nothing on the stack.
 * Methods are looked up in the metatable itself. */
static MR_UNUSED void mr_new_type(lua_State *L, const char *type, const luaL_Reg *methods) {
  luaL_newmetatable(L, type);
  lua_pushstring(L, type);
  lua_setfield(L, -2, "__name");
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index");
  luaL_setfuncs(L, methods, 0);
  lua_pop(L, 1);
}

/* A lua_Integer may be narrower than 64 bits where Lua has no integers of its own. */
static MR_UNUSED void mr_push_int64(lua_State *L, int64_t n) {
#if MR_HAS_INTEGERS
  lua_pushinteger(L, n);
#else
  lua_pushnumber(L, (lua_Number)n);
#endif
}

/* A userdata with room for one table (its "environment" before 5.2, its uservalue since). */
static MR_UNUSED void *mr_new_userdata(lua_State *L, size_t size) {
#if LUA_VERSION_NUM >= 504
  return lua_newuserdatauv(L, size, 1);
#else
  return lua_newuserdata(L, size);
#endif
}

/* Pops a table and keeps it with the userdata at `index`. */
static MR_UNUSED void mr_set_uservalue(lua_State *L, int index) {
#if LUA_VERSION_NUM >= 504
  lua_setiuservalue(L, index, 1);
#elif LUA_VERSION_NUM >= 502
  lua_setuservalue(L, index);
#else
  lua_setfenv(L, index);
#endif
}

/* Pushes the table that mr_set_uservalue kept; undefined before the first set. */
static MR_UNUSED void mr_get_uservalue(lua_State *L, int index) {
#if LUA_VERSION_NUM >= 504
  lua_getiuservalue(L, index, 1);
#elif LUA_VERSION_NUM >= 502
  lua_getuservalue(L, index);
#else
  lua_getfenv(L, index);
#endif
}

#endif
