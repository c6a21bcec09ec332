-- moonrabbit in another event loop, by its public API:
--   in_loop.lua RUNTIME MODE URL SIZE COUNT WINDOW
-- The work of peers/moonrabbit.lua, as a task of that loop.
local here = arg[0]:match "^(.*)/peers/" or "."
package.path = here .. "/../spec/?.lua;" .. package.path
local loops = require "support.loops"

local runtime = table.remove(arg, 1)
loops.run(runtime, function()
  MOONRABBIT = require("moonrabbit").on(runtime) -- luacheck: ignore 111
  arg[0] = here .. "/peers/moonrabbit.lua" -- luacheck: ignore 122
  assert(loadfile(arg[0]))() -- LuaJIT cannot yield in a dofile
end)
