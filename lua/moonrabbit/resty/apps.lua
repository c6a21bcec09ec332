--- Apps in the workers of nginx: each worker runs the script that `moonrabbit run` runs.
--
-- The script is loaded as the worker starts, and never read afterwards: `nginx -s reload` starts workers with the new
-- one, while the old ones handle what they have. An app has two connections of its own in each worker, one to consume
-- and one to publish its copies. Both belong to one timer, and end together: when one of them is lost, or a consumer of
-- the app ends, the app begins anew in a fresh timer, and declares what is missing.
--
-- A script waits with `mr.sleep` and `ngx.sleep`; the former can be ended by the `timeout` of its consumer. What a worker
-- keeps in memory (breakers, canaries, rates, `order_by`, `dedupe.memory`) is that worker's alone.
-- @module moonrabbit.resty.apps

local Keeper = require "moonrabbit.resty.keeper"
local errors = require "moonrabbit.errors"
local life = require "moonrabbit.resty.life"
local moonrabbit = require "moonrabbit"
local runtime = require "moonrabbit.runtime.resty"
local script = require "moonrabbit.life.script"

local now = runtime.now

local apps = {}

-- A publishing connection whose app is over says goodbye for so long.
local GOODBYE = 1

-- What scripts wait with. The native runtime's would block the worker, and throws here anyway.
moonrabbit.sleep, moonrabbit.spawn = runtime.sleep, runtime.spawn

-- ---- Loading ----------------------------------------------------------------------------------------

-- As nginx takes the files of its own directives: from its prefix.
local function absolute(path)
  if path:sub(1, 1) == "/" then return path end
  local prefix = ngx.config.prefix()
  return (prefix:find "/$" and prefix or prefix .. "/") .. path
end

local function store_of(consumer)
  local dedupe = consumer.dedupe
  return dedupe and (dedupe.store or dedupe) or {}
end

-- Why an app cannot run in nginx: a store refuses it.
local function objection(app)
  for _, consumer in ipairs(app.plan.consumers) do
    local store = store_of(consumer)
    if store.attach then
      local ok, problem = pcall(store.attach, store, runtime)
      if not ok then return ("the consumer of '%s': %s"):format(consumer.queue, tostring(problem)) end
    end
  end
end

-- What holds in one process, and is less than it seems with several.
local function warn(app)
  if ngx.worker.id() ~= 0 then return end
  for _, consumer in ipairs(app.plan.consumers) do
    local text
    if store_of(consumer).one_process then
      text = "dedupe.memory knows what its own worker has handled, and forgets it at a reload: dedupe.shared and"
        .. " dedupe.redis are for all"
    elseif consumer.order_by and not consumer.partitions and ngx.worker.count() > 1 then
      text = "order_by holds within a worker: with several, `partitions` keeps the order of a key"
    end
    if text then runtime.log("warn", ("the app '%s', queue '%s': %s"):format(app.name, consumer.queue, text)) end
  end
end

--- The app that a script returns; nil and what is wrong with it: file, line, and what was expected.
---@param path string as nginx's directives have it: relative to nginx's prefix
---@return moonrabbit.App|nil, string? problem
function apps.load(path)
  path = absolute(path)
  local app, problem = script.load(path)
  if not app then return nil, problem end
  problem = objection(app)
  if problem then return nil, path .. ": " .. problem end
  return app
end

-- ---- An app that is kept ----------------------------------------------------------------------------

---@class moonrabbit.resty.KeptApp
---@field app moonrabbit.App
local Kept = {}
Kept.__index = Kept

-- What a script does as its app starts may throw: that is told like everything else, and tried again.
local function start(app, connections)
  local whole, ok, err = xpcall(app.start, debug.traceback, app, connections)
  if whole then return ok, err end
  return nil, errors.new { kind = "closed", temporary = false, message = "starting it threw: " .. tostring(ok) }
end

-- Why it cannot go on as it is: a connection or a consumer has ended.
local function broken(self)
  for _, connection in ipairs(self.connections) do
    local state, reason = connection:state()
    if state ~= "open" then return reason or errors.new { kind = "closed", message = "a connection is closed" } end
  end
  for _, consumer in ipairs(self.app._consumers) do
    local reason = consumer:reason()
    if reason then return reason end
  end
  return self.app.reason
end

local function watch(self)
  local changed = self.changed
  local function tell() changed:broadcast() end
  for _, connection in ipairs(self.connections) do connection:on("closed", tell) end
  for _, consumer in ipairs(self.app._consumers) do
    consumer.channel:on("close", tell)
    consumer.channel:on("cancel", tell)
  end
end

-- How long what is being handled may take.
local function patience(self, keeper)
  if life.exiting then return math.max(0, keeper.leave_by - now()) end
  for _, connection in ipairs(self.connections) do
    if not connection:is_open() then return 0 end
  end
  return self.config.exit_timeout
end

local function run(self, keeper)
  watch(self)
  local app, reason = self.app, broken(self)
  while not reason and not life.exiting and app.state == "running" do
    self.changed:wait()
    reason = broken(self)
  end
  local ok, err = app:stop(patience(self, keeper))
  if not ok then runtime.log("warn", ("the app '%s': %s"):format(app.name, tostring(err))) end
  return reason
end

local function set_up(self, conn, keeper)
  local config = self.config
  if config.setup then
    local ok, err = config.setup(conn)
    if not ok and err then return nil, err end
  end
  local publishing, err = keeper:connect(config.connect_publishing)
  local watch_it = config.watch_publishing
  if not publishing then
    if watch_it then watch_it:lost(not life.exiting and err or nil) end
    return nil, err
  end
  if watch_it then watch_it:opened(publishing) end
  self.connections = { conn, publishing }
  local ok
  ok, err = start(self.app, { consume = conn, publish = publishing })
  if ok and config.began then config.began() end
  return ok, err
end

local function work(self, conn, keeper)
  local ok, err = set_up(self, conn, keeper)
  if ok then return run(self, keeper) end
  if err.temporary == false then keeper:seldom() end
  return err
end

-- Closes the connection that publishes, if there is one, unless it was what has ended.
local function leave(self)
  local publishing = self.connections[2]
  if not publishing then return end
  local state, reason = publishing:state()
  if state == "open" then publishing:close(GOODBYE) end
  local watch_it = self.config.watch_publishing
  if watch_it then watch_it:lost(state ~= "open" and not life.exiting and reason or nil) end
end

--- Runs in a timer of its own, for as long as its connections last. Returns why it ended.
---@param conn moonrabbit.Connection
---@param keeper moonrabbit.resty.Keeper
function Kept:serve(conn, keeper)
  self.connections, self.changed = { conn }, runtime.condition()
  local whole, err = xpcall(work, debug.traceback, self, conn, keeper)
  leave(self)
  if not whole then error(err, 0) end
  return err
end

--- Runs an app in this worker for as long as it lives.
--- config: `name` for the log, `connect` and `connect_publishing` () -> Connection or nil, err, `setup`,
--- `backoff`, `exit_timeout`; `watch` and `watch_publishing` hear of the two connections, began() of each start.
---@param app moonrabbit.App
---@param config table
---@return moonrabbit.resty.KeptApp
function apps.keep(app, config)
  warn(app)
  local self = setmetatable({ app = app, config = config, connections = {} }, Kept)
  self.keeper = Keeper.new {
    name = config.name, connect = config.connect, backoff = config.backoff, exit_timeout = config.exit_timeout,
    watch = config.watch,
    serve = function(conn, keeper) return self:serve(conn, keeper) end,
    wanted = function() return false end,
    failed = function() end,
    forsaken = function() leave(self) end,
  }
  life.on_exit(function() if self.changed then self.changed:broadcast() end end)
  return self
end

return apps
