/* The module moonrabbit.core: puts the parts together. */
#include "lua/binding.h"

/* ---- functions of the module that belong to no object ---- */

static int codec_version(lua_State *L) {
  lua_pushstring(L, amqp_version());
  return 1;
}

/* core.owner(message | confirmation) */
static int owner(lua_State *L) {
  if (!mrl_test_tag(L, 1, MR_IS_MESSAGE, sizeof(mrl_message)) &&
      !mrl_test_tag(L, 1, MR_IS_CONFIRMATION, sizeof(mrl_confirmation)))
    return luaL_argerror(L, 1, "message or confirmation expected");
  mr_get_uservalue(L, 1);
  lua_rawgeti(L, -1, MR_ANCHOR_OWNER);
  return 1;
}

const char MR_IS_QUEUE[] = MR_QUEUE_TYPE;
const char MR_IS_CHANNEL[] = MR_CHANNEL_TYPE;
const char MR_IS_CONFIRMATION[] = MR_CONFIRMATION_TYPE;
const char MR_IS_MESSAGE[] = MR_MESSAGE_TYPE;

const luaL_Reg mrl_core_functions[] = {{"engine", mrl_new_engine},
                                       {"route", mrl_new_route},
                                       {"ack", mrl_ack},
                                       {"acker", mrl_acker},
                                       {"settle", mrl_settle},
                                       {"outstanding", mrl_outstanding},
                                       {"key_without", mrl_key_without},
                                       {"outcome", mrl_outcome},
                                       {"acked", mrl_acked},
                                       {"conclude", mrl_conclude},
                                       {"take_acked", mrl_take_acked},
                                       {"pack", mrl_pack},
                                       {"set_headers", mrl_set_headers},
                                       {"owner", owner},
                                       {"is_message", mrl_is_message},
                                       {"encode_table", mrl_encode_table},
                                       {"decode_table", mrl_decode_table},
                                       {"codec_version", codec_version},
                                       {"random", mrl_random_number},
                                       {"random_bytes", mrl_random_bytes},
                                       {NULL, NULL}};

/* ---- luaopen ---- */

static int null_tostring(lua_State *L) {
  lua_pushliteral(L, "null");
  return 1;
}

/* Pushes core.null. */
static void new_null(lua_State *L) {
  lua_newuserdata(L, 1);
  luaL_newmetatable(L, MR_NULL_TYPE);
  lua_pushliteral(L, MR_NULL_TYPE);
  lua_setfield(L, -2, "__name");
  lua_pushcfunction(L, null_tostring);
  lua_setfield(L, -2, "__tostring");
  lua_setmetatable(L, -2);
}

static void new_weak_table(lua_State *L) {
  lua_newtable(L);
  lua_createtable(L, 0, 1);
  lua_pushliteral(L, "k");
  lua_setfield(L, -2, "__mode");
  lua_setmetatable(L, -2);
}

static void new_type(lua_State *L, const char *name) {
  luaL_newmetatable(L, name);
  lua_pushstring(L, name);
  lua_setfield(L, -2, "__name");
}

/* Pushes what every C function gets as upvalues, in the order of their numbers. */
static mrl_state *push_upvalues(lua_State *L) {
  mrl_state *st = mrl_state_new(L);
  new_type(L, MR_ENGINE_TYPE);
  new_type(L, MR_CHANNEL_TYPE);
  new_type(L, MR_QUEUE_TYPE);
  new_type(L, MR_MESSAGE_TYPE);
  new_type(L, MR_CONFIRMATION_TYPE);
  new_type(L, MR_ROUTE_TYPE);
  new_type(L, MR_TYPED_TYPE);
  new_null(L);
  st->null = lua_touserdata(L, -1);
  new_weak_table(L);
  new_weak_table(L);
  lua_newtable(L);
  return st;
}

static void intern_keys(lua_State *L, mrl_state *st, int state) {
  int n;
  const char *const *names = mrl_option_names(&n);
  mr_get_uservalue(L, state);
  for (int i = 0; i < n; i++) mrl_intern(L, st, lua_gettop(L), MR_KEYS_OPTIONS + i, names[i]);
  for (int i = 0; mrl_message_keys[i]; i++)
    mrl_intern(L, st, lua_gettop(L), MR_KEYS_MESSAGE + i, mrl_message_keys[i]);
  lua_pop(L, 1);
}

/* Puts the functions into the table at `table`, with the shared upvalues. */
static void set_functions(lua_State *L, int table, int first, const luaL_Reg *functions) {
  lua_pushvalue(L, table);
  for (int i = 0; i < MR_UP_COUNT; i++) lua_pushvalue(L, first + i);
  luaL_setfuncs(L, functions, MR_UP_COUNT);
  lua_pop(L, 1);
}

static void fill_types(lua_State *L, int first) {
  static const struct {
    int up;
    const luaL_Reg *functions;
    bool own_index; /* methods are found in the metatable itself */
  } types[] = {{MR_UP_ENGINE, mrl_engine_functions, true},
               {MR_UP_CHANNEL, mrl_channel_functions, true},
               {MR_UP_QUEUE, mrl_queue_functions, true},
               {MR_UP_MESSAGE, mrl_message_functions, false},
               {MR_UP_CONFIRMATION, mrl_confirmation_functions, false},
               {MR_UP_ROUTE, mrl_route_functions, false},
               {MR_UP_TYPED, mrl_typed_functions, false}};
  for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
    int metatable = first + types[i].up - 1;
    set_functions(L, metatable, first, types[i].functions);
    if (!types[i].own_index) continue;
    lua_pushvalue(L, metatable);
    lua_setfield(L, metatable, "__index");
  }
}

/* A second luaopen must give the same module: its metatables are in the registry. */
static const char LOADED[] = "moonrabbit.core.module";

MR_EXPORT int luaopen_moonrabbit_core(lua_State *L);

int luaopen_moonrabbit_core(lua_State *L) {
  luaL_checkversion(L);
  luaL_checkstack(L, 4 * MR_UP_COUNT, NULL);
  lua_getfield(L, LUA_REGISTRYINDEX, LOADED);
  if (lua_istable(L, -1)) return 1;
  lua_pop(L, 1);
  lua_newtable(L);
  int module = lua_gettop(L), first = module + 1;
  mrl_state *st = push_upvalues(L);
  intern_keys(L, st, first);
  fill_types(L, first);
  set_functions(L, module, first, mrl_core_functions);
  mrl_push_types(L, first);
  lua_setfield(L, module, "types");
  lua_pushvalue(L, first + MR_UP_NULL - 1);
  lua_setfield(L, module, "null");
  lua_pushvalue(L, first + MR_UP_MESSAGE_METHODS - 1);
  lua_setfield(L, module, "message_methods");
  lua_newtable(L);
  lua_pushvalue(L, -1);
  lua_setfield(L, module, "confirmation_methods");
  lua_setfield(L, first + MR_UP_CONFIRMATION - 1, "__index");
  lua_settop(L, module);
  lua_pushvalue(L, module);
  lua_setfield(L, LUA_REGISTRYINDEX, LOADED);
  return 1;
}
