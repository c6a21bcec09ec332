--- moonrabbit: RabbitMQ for Lua.
--
--     local moonrabbit = require "moonrabbit"
--     local conn = assert(moonrabbit.connect "amqp://guest:guest@localhost/")
--     local ch = assert(conn:channel { confirm = true, prefetch = 100 })
--     assert(ch:queue_declare("task_queue", { durable = true }))
--     assert(ch:publish("hello", { routing_key = "task_queue" }))
--     local consumer = assert(ch:consume "task_queue")
--     for msg in consumer:messages() do
--       print(msg.body)
--       msg:ack()
--     end
--
-- Errors: mistakes of the program throw; everything the world can do returns `nil, err`, with
-- err.kind, err.message and err.temporary (moonrabbit.errors). Timeouts are in seconds everywhere, and
-- every call that waits has one.
--
-- The parts are loaded when they are first used.
-- @module moonrabbit

---@class moonrabbit
---@field null userdata                   AMQP's void, in headers and arguments
---@field types table<string, function>   exact wire types: timestamp bytes decimal int8 … uint64 float double
---@field errors table
---@field uri table
local moonrabbit = { _VERSION = "moonrabbit scm" }

--- Connects to a broker. See moonrabbit.connection.
---@param options string|moonrabbit.ConnectOptions a URI, or options
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function moonrabbit.connect(options)
  local connection, err = require("moonrabbit.connection").connect(options, 2)
  return connection, err
end

--- A pool of connections and channels. See moonrabbit.pool.
---@param options string|moonrabbit.PoolOptions
---@return moonrabbit.Pool
function moonrabbit.pool(options)
  local pool = require("moonrabbit.pool").new(options, 2)
  return pool
end

local function native()
  return require("moonrabbit.runtime").find("native", 3)
end

--- Runs `fn` as a task of the native runtime, and the event loop until it ends. Returns its results,
--- or throws its error.
function moonrabbit.run(fn, ...)
  return native().run(fn, ...)
end

--- Starts a task of the native runtime.
function moonrabbit.spawn(fn, ...)
  return native().spawn(fn, ...)
end

--- Waits in the way of the native runtime: others run meanwhile.
---@param seconds number
function moonrabbit.sleep(seconds)
  return native().sleep(seconds)
end

--- pcall that what it calls may yield through, on PUC Lua 5.1 too.
function moonrabbit.pcall(fn, ...)
  return require("moonrabbit.protect")(fn, ...)
end

local lazy = {
  null = function() return require("moonrabbit.core").null end,
  types = function() return require("moonrabbit.core").types end,
}
for _, name in ipairs { "errors", "uri", "options" } do
  lazy[name] = function() return require("moonrabbit." .. name) end
end

return setmetatable(moonrabbit, {
  __index = function(self, name)
    local load = lazy[name]
    if not load then return nil end
    local value = load()
    rawset(self, name, value)
    return value
  end,
})
