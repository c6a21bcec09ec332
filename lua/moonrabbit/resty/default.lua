--- The client of this worker that everybody uses who names none.
-- @module moonrabbit.resty.default

local phases = require "moonrabbit.resty.phases"
local process = require "moonrabbit.resty.process"

local default = {}

--- The client that start made; throws, with what is to be done, where there is none.
---@param what string who asks
---@param level integer of the caller
---@return moonrabbit.resty.Client
function default.client(what, level)
  local client = default.made
  if client then return client end
  level = level + 1
  if process.is_started() then
    error(what .. ": lua_code_cache is off, so that each request has a Lua of its own, where nothing was started:"
      .. " switch it on", level)
  end
  error(("%s: call moonrabbit.resty.start in init_worker_by_lua* first (this is %s)"):format(what, phases.current()),
    level)
end

return default
