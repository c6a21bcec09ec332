--- The life of an app in a process: connect, run, reload, stop.
--
-- It keeps trying while the broker is away, and ends on what trying again cannot help against. The two connections
-- are the host's, so a reload keeps them: the new app is loaded and checked first, then started beside the old one,
-- which takes no more messages and handles those that it has. With `order_by` or `partitions` the old one drains
-- first, or messages of one key would be handled by both. De-duplication, breakers and canaries go on as they are.
-- @module moonrabbit.life.host

local Backoff = require "moonrabbit.connection.backoff"
local errors = require "moonrabbit.errors"
local notify = require "moonrabbit.life.notify"
local protect = require "moonrabbit.protect"
local telemetry = require "moonrabbit.life.telemetry"
local text_of = require "moonrabbit.app.failure".text

---@class moonrabbit.life.HostOptions
---@field runtime table
---@field load fun(): moonrabbit.App|nil, string?  the app; nil and what is wrong with it
---@field connect table               options of moonrabbit.connect
---@field drain number                seconds
---@field log fun(level: string, text: string, fields: table?)
---@field metrics moonrabbit.Metrics? that are to tell of it
---@field management moonrabbit.Management?  whom they ask about its ladders
---@field ready fun()?                called when it consumes for the first time
---@field reloaded fun(ok: boolean, problem: any)?  called when the script was loaded again, or not

---@class moonrabbit.life.Host
---@field app moonrabbit.App
---@field phase "starting"|"running"|"stopping"|"stopped"
---@field asked boolean  whether it was told to stop
local Host = {}
Host.__index = Host

local host = {}

local function nothing() end

--- A host. Nothing happens yet.
---@param opts moonrabbit.life.HostOptions
---@return moonrabbit.life.Host
function host.new(opts)
  return setmetatable({
    runtime = opts.runtime, load = opts.load, options = opts.connect, drain = opts.drain, log = opts.log,
    telemetry = telemetry.new(opts), on_ready = opts.ready or nothing,
    on_reloaded = opts.reloaded or nothing, phase = "starting", asked = false, app = false,
    connections = {}, retiring = 0,
    changed = opts.runtime.condition(), backoff = Backoff.new { first = 0.5, max = 30 },
  }, Host)
end

-- ---- The end ----------------------------------------------------------------------------------------

local function finish(self, ok, err)
  if self.phase == "stopped" then return end
  self.phase, self.ok, self.err = "stopped", ok, err
  self.changed:broadcast()
end

--- Whether it consumes, and both connections are open; nil and why not.
---@return true|nil, string?
function Host:is_ready()
  if self.phase ~= "running" then return nil, self.phase end
  for _, role in ipairs { "consume", "publish" } do
    local state, why = self.connections[role]:state()
    if state ~= "open" then
      return nil, ("the connection to %s is %s%s"):format(role, state, why and ": " .. tostring(why) or "")
    end
  end
  return true
end

-- ---- Starting ---------------------------------------------------------------------------------------

local final_kinds = { auth = true, vhost = true, tls = true }

-- Refusals of what is declared, and what the connection is refused for, do not pass.
local function is_final(err)
  if err.code == 403 or err.code == 404 or err.code == 406 then return true end
  return err.temporary == false and (final_kinds[err.kind] or err.code ~= nil)
end

-- Waits for the next attempt; false: it is to stop.
local function pause(self, err)
  local seconds = self.backoff:next()
  self.log("warn", ("%s (trying again in %.1f s)"):format(tostring(err), seconds))
  notify.send("STATUS=waiting for the broker")
  local now = self.runtime.now
  local due = now() + seconds
  while self.phase == "starting" and now() < due do self.changed:wait(due - now()) end
  return self.phase == "starting"
end

local function name_of(self, role) return ("%s (%s)"):format(self.options.name or self.app.name, role) end

local function open(self, role)
  local opts = {}
  for name, value in pairs(self.options) do opts[name] = value end
  opts.name, opts.log = name_of(self, role), self.log
  return require("moonrabbit.connection").connect(opts, 2)
end

local function connect(self)
  for _, role in ipairs { "consume", "publish" } do
    local known = self.connections[role]
    if not known or known:state() == "closed" then
      local connection, err = open(self, role)
      if not connection then return nil, err end
      self.connections[role] = connection
      self.telemetry:watch(role, connection, name_of(self, role))
      connection:on("closed", function(why)
        if self.phase == "running" then finish(self, nil, why) end
      end)
    end
  end
  return true
end

-- It may lose a consumer for good, though both connections go on.
local function watch(self, app)
  local ok, err = app:wait()
  if not ok and self.app == app and self.phase == "running" then finish(self, nil, err) end
end

-- What a script does as its app starts may throw: nil, the error, and true.
local function start(self, app)
  local whole, ok, err = protect(app.start, app, self.connections)
  if not whole then return nil, "starting the app threw: " .. text_of(ok), true end
  if ok then self.runtime.spawn(watch, self, app) end
  return ok, err
end

local function bring_up(self)
  while self.phase == "starting" do
    local ok, err, threw = connect(self)
    if ok and self.phase == "starting" then ok, err, threw = start(self, self.app) end
    if ok or self.phase ~= "starting" then break end
    if threw or is_final(err) then return finish(self, nil, err) end
    if not pause(self, err) then return end
  end
  if self.phase ~= "starting" then return end
  self.phase = "running"
  notify.send("READY=1", "STATUS=running")
  self.telemetry:started(self.app)
  self.log("info", ("the app '%s' runs"):format(self.app.name))
  self.on_ready()
  if self.again then self:reload() end -- it was asked to meanwhile
end

-- ---- Stopping ---------------------------------------------------------------------------------------

local function close_connections(self)
  for _, connection in pairs(self.connections) do connection:close(5) end
end

local function drain(self)
  local now = self.runtime.now
  local deadline = now() + math.min(self.drain, 1e9)
  while self.reloading and now() < deadline do self.changed:wait(deadline - now()) end
  local whole, ok, err = protect(self.app.stop, self.app, math.max(0, deadline - now()))
  if not whole then ok, err = nil, "stopping threw: " .. text_of(ok) end
  while self.retiring > 0 and now() < deadline do self.changed:wait(deadline - now()) end
  if ok and self.retiring > 0 then
    ok, err = nil, errors.new { kind = "timeout", message = "messages of the old script were not done in time" }
  end
  close_connections(self)
  finish(self, ok, err)
end

--- Takes no more messages, handles those that have come within `drain` seconds, and ends.
function Host:stop()
  if self.phase == "stopping" or self.phase == "stopped" then return end
  self.phase, self.asked = "stopping", true
  self.changed:broadcast()
  notify.send("STOPPING=1", "STATUS=draining")
  self.log("info", ("stopping: what has arrived is handled, for up to %g s"):format(self.drain))
  self.runtime.spawn(drain, self)
end

-- ---- Reload -----------------------------------------------------------------------------------------

local function store_of(consumer)
  local dedupe = consumer and consumer.dedupe
  return dedupe and (dedupe.store or dedupe)
end

-- A store in memory goes on itself: both scripts use it until the old one is done. A function that undoes that.
local function keep_stores(old, new)
  local before, undo = {}, {}
  for _, consumer in ipairs(old.plan.consumers) do before[consumer.queue] = consumer end
  for _, consumer in ipairs(new.plan.consumers) do
    local kept, store = store_of(before[consumer.queue]), store_of(consumer)
    if kept and store and kept.take_place_of and getmetatable(kept) == getmetatable(store) then
      undo[#undo + 1] = kept:take_place_of(store)
      if consumer.dedupe.store then consumer.dedupe.store = kept else consumer.dedupe = kept end
    end
  end
  return function()
    for i = #undo, 1, -1 do undo[i]() end
  end
end

local function keeps_order(app)
  for _, consumer in ipairs(app.plan.consumers) do
    if consumer.order_by or consumer.partitions then return true end
  end
  return false
end

local function retire(self, old)
  local ok, err = old:stop(self.drain)
  if not ok then self.log("warn", "the old script: " .. tostring(err)) end
end

local function retire_beside(self, old)
  self.retiring = self.retiring + 1
  self.runtime.spawn(function()
    protect(retire, self, old)
    self.retiring = self.retiring - 1
    self.changed:broadcast()
  end)
end

local function start_again(self, old)
  local ok, err = start(self, old)
  if not ok then finish(self, nil, err) end
end

-- One after the other; when the new one does not start, the old one does again.
local function swap_in_order(self, old, new)
  retire(self, old)
  local state = old:save()
  new:restore(state)
  local ok, err = start(self, new)
  if ok then
    self.app = new
    return true
  end
  old:restore(state)
  start_again(self, old)
  return nil, err
end

local function swap_beside(self, old, new)
  new:restore(old:save())
  local ok, err = start(self, new)
  if not ok then return nil, err end
  self.app = new
  retire_beside(self, old)
  return true
end

local function swap(self, old, new)
  local undo = keep_stores(old, new)
  local way = (keeps_order(old) or keeps_order(new)) and swap_in_order or swap_beside
  local ok, err = way(self, old, new)
  if not ok then undo() end
  return ok, err
end

local function reload_all(self)
  while self.again and self.phase == "running" do
    self.again = false
    local new, problem = self.load()
    local ok
    if new then
      self.telemetry:observe(new)
      ok, problem = swap(self, self.app, new)
    end
    self.telemetry:reloaded(ok)
    if self.phase == "running" then self.telemetry:started(self.app) end -- the old one may have started anew
    if ok then
      self.log("info", "reloaded")
    else
      self.log("error", "not reloaded, the old script goes on: " .. tostring(problem))
    end
    self.on_reloaded(ok, problem)
  end
end

--- Loads the script again, and runs it instead of the old one if it is sound.
function Host:reload()
  self.again = true
  if self.reloading or self.phase ~= "running" then return end
  self.reloading = true
  notify.reloading()
  self.runtime.spawn(function()
    local whole, err = protect(reload_all, self)
    if not whole then
      self.log("error", "reloading threw: " .. text_of(err))
      self.on_reloaded(false, text_of(err))
      if self.phase == "running" and self.app.state == "stopped" then start_again(self, self.app) end
    end
    self.reloading = false
    if self.phase == "running" then notify.send("READY=1", "STATUS=running") end
    self.changed:broadcast()
  end)
end

-- ---- All of it --------------------------------------------------------------------------------------

local function keep_alive(self, every)
  while self.phase ~= "stopped" do
    notify.send "WATCHDOG=1"
    self.runtime.sleep(every)
  end
end

--- Runs an app until it is stopped: true; nil, err: what ended it, or was not done in time (kind `timeout`).
---@param app moonrabbit.App
---@return true|nil, moonrabbit.Error?
function Host:run(app)
  self.app = app
  self.telemetry:observe(app)
  local every = notify.watchdog()
  if every then self.runtime.spawn(keep_alive, self, every) end
  self.runtime.spawn(function()
    local whole, err = protect(bring_up, self)
    if whole then return end
    self.log("error", "starting threw: " .. text_of(err))
    if self.phase == "starting" then finish(self, nil, "starting threw: " .. text_of(err)) end
  end)
  while self.phase ~= "stopped" do self.changed:wait() end
  return self.ok, self.err
end

return host
