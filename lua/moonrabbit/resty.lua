--- moonrabbit inside nginx (OpenResty, or nginx with ngx_lua): nothing here blocks a worker.
--
--     local moonrabbit = require "moonrabbit.resty"
--     local conn, err = moonrabbit.connect "amqp://guest:guest@127.0.0.1/"
--
-- The API is that of moonrabbit.connection. A connection belongs to the request or the timer that
-- opened it (as every cosocket does) and must be closed by it: use it where waiting is allowed
-- (rewrite, access and content phases, timers). Names are looked up by nginx's `resolver`, but for
-- "localhost", which means 127.0.0.1. Trusted certificates come from `lua_ssl_trusted_certificate`.
-- @module moonrabbit.resty

local Connection = require "moonrabbit.connection"
local runtime = require "moonrabbit.runtime.resty"
local core = require "moonrabbit.core"

local resty = {
  spawn = runtime.spawn,
  sleep = runtime.sleep,
  pcall = runtime.pcall,
  null = core.null,
  types = core.types,
}

local function with_runtime(options, what)
  if type(options) == "string" then return { uri = options, runtime = runtime } end
  if type(options) ~= "table" then error(what .. ": a URI or a table of options expected", 3) end
  if options.runtime ~= nil then error(what .. ": unknown option 'runtime' (this is the resty runtime)", 3) end
  local all = { runtime = runtime }
  for key, value in pairs(options) do all[key] = value end
  return all
end

--- Connects, as moonrabbit.connect does, over a cosocket. The option `runtime` is not for this one.
---@param options string|moonrabbit.ConnectOptions as for moonrabbit.connect
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function resty.connect(options)
  local connection, err = Connection.connect(with_runtime(options, "connect"), 2)
  return connection, err
end

return resty
