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
-- every call that waits has one; math.huge is for ever.
--
-- The parts are loaded when they are first used.
-- @module moonrabbit

---@class moonrabbit
---@field null userdata                   AMQP's void, in headers and arguments
---@field types table<string, function>   exact wire types of headers and arguments: `types.int64 "9007199254740993"`. timestamp bytes decimal boolean int8 uint8 int16 uint16 int32 uint32 int64 uint64 float double; integers take a number or a string of digits, `decimal(1234, 2)` is 12.34
---@field errors table                    the module moonrabbit.errors
---@field uri table                       the module moonrabbit.uri
---@field testing table                   the module moonrabbit.testing
---@field app fun(spec: moonrabbit.AppOptions): moonrabbit.App  declares an app: moonrabbit.app
---@field route table                     the module moonrabbit.app.route
---@field outcome table                   the module moonrabbit.app.outcome
---@field permanent fun(reason: any): moonrabbit.Permanent  an error that no retry helps against
---@field dedupe table                    the module moonrabbit.app.dedupe
---@field management table                the module moonrabbit.management
---@field queue table                     the module moonrabbit.queue
---@field metrics table                   the module moonrabbit.metrics
---@field log table                       the module moonrabbit.log
---@field trace table                     the module moonrabbit.trace
---@field config table                    configuration by environment, `mr.config { … }`: the module moonrabbit.config
---@field secret table                    passwords from where they are kept: the module moonrabbit.secret
---@field retry table                     retry policies: the module moonrabbit.app.retry
local moonrabbit = { _VERSION = "moonrabbit scm" }

--- Connects to a broker. What a URI and an option both say, the option decides.
--- err.kind: `dns`, `refused`, `timeout`, `tls`, `auth`, `vhost`, `protocol`, `closed`; of several
--- endpoints the last one's.
---@param options string|moonrabbit.ConnectOptions a URI, or options
---@return moonrabbit.Connection|nil, moonrabbit.Error?
function moonrabbit.connect(options)
  local connection, err = require("moonrabbit.connection").connect(options, 2)
  return connection, err
end

--- A pool of connections and channels. See moonrabbit.pool. Nothing is connected yet.
---@param options string|moonrabbit.PoolOptions a URI stands for { connect = URI }
---@return moonrabbit.Pool
function moonrabbit.pool(options)
  local pool = require("moonrabbit.pool").new(options, 2)
  return pool
end

--- moonrabbit in another event loop: a table with the functions `connect`, `pool`, `spawn`, `sleep` and
--- `pcall` of this module, for that loop, and its `null`, `types`, `errors` and `uri`. They are called in
--- coroutines of that loop; each has a page in docs/ with an example.
---@param runtime ("cqueues"|"copas"|"luv"|"native"|string|table) a name, or a runtime (docs/internals.md)
---@return moonrabbit.On
function moonrabbit.on(runtime)
  local on = require("moonrabbit.on").on(runtime, 2)
  return on
end

local function native()
  return require("moonrabbit.runtime").find("native", 3)
end

--- Runs `fn` as a task of the native runtime, and the event loop until it ends. Returns its results,
--- or throws its error. Other tasks go on when the loop runs again.
---@param fn function
---@param ... any its arguments
---@return any ... what fn returned
function moonrabbit.run(fn, ...)
  return native().run(fn, ...)
end

--- Starts a task of the native runtime, at the next turn of its event loop. An error that leaves `fn` is
--- reported on stderr, with its traceback.
---@param fn function
---@param ... any its arguments
---@return table task
function moonrabbit.spawn(fn, ...)
  return native().spawn(fn, ...)
end

--- Waits in the way of the native runtime: others run meanwhile.
---@param seconds number 0: until the next turn of the event loop
function moonrabbit.sleep(seconds)
  return native().sleep(seconds)
end

--- pcall that what it calls may yield through, on PUC Lua 5.1 too.
---@param fn function
---@param ... any its arguments
---@return boolean ok
---@return any ... what fn returned, or its error
function moonrabbit.pcall(fn, ...)
  return require("moonrabbit.protect")(fn, ...)
end

local lazy = {
  null = function() return require("moonrabbit.core").null end,
  types = function() return require("moonrabbit.core").types end,
}
for _, name in ipairs { "errors", "uri", "options", "management", "queue", "metrics", "log", "testing",
  "trace", "config", "secret" } do
  lazy[name] = function() return require("moonrabbit." .. name) end
end
for _, name in ipairs { "route", "retry", "dedupe", "outcome" } do
  lazy[name] = function() return require("moonrabbit.app." .. name) end
end
function lazy.app() return require("moonrabbit.app").new end
function lazy.permanent() return require("moonrabbit.app.outcome").permanent end

return setmetatable(moonrabbit, {
  __index = function(self, name)
    local load = lazy[name]
    if not load then return nil end
    local value = load()
    rawset(self, name, value)
    return value
  end,
})
