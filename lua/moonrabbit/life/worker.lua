--- A worker's side of the line to its parent, `moonrabbit run --workers N`.
--
-- The parent stops it by SIGTERM, and again and again if need be: a manager that signals the whole group of
-- processes must not take the drain for itself. It reloads when the parent says so, one after the other. When the parent
-- has gone, it stops.
-- @module moonrabbit.life.worker

local line = require "moonrabbit.life.line"
local net = require "moonrabbit.net"

---@class moonrabbit.life.Worker
local Worker = {}
Worker.__index = Worker

local worker = {}

--- nil, and what is wrong: nobody has started it as a worker.
---@param runtime table
---@return moonrabbit.life.Worker|nil, string?
function worker.new(runtime)
  local stream, err = net.parent()
  if not stream then return nil, "a worker is started by 'moonrabbit run --workers N' only: " .. err end
  return setmetatable({ runtime = runtime, line = line.new(runtime, runtime.transport(stream)), host = false }, Worker)
end

local function page(self)
  local ready, why = self.host:is_ready()
  local reason = ready and "" or tostring(why):gsub("[\r\n]+", " ")
  return reason .. "\n" .. (self.metrics and self.metrics:text() or "")
end

local answers = {
  page = function(self) self.line:send("page", page(self)) end,
  reload = function(self) self.host:reload() end,
}

local function listen(self)
  local word = self.line:receive()
  while word do
    if answers[word] then answers[word](self) end
    word = self.line:receive()
  end
  if self.host.phase == "stopped" then return end
  self.log("warn", "the parent has gone")
  self.host:stop()
end

--- It consumes.
function Worker:ready() self.line:send "ready" end

--- The script was loaded again, or not, and why not.
---@param ok boolean
---@param problem any
function Worker:reloaded(ok, problem)
  self.line:send("reload", ok and "" or tostring(problem or "it was not loaded"))
end

--- Says its last word: what it has counted.
function Worker:leave()
  self.line:send("page", page(self))
  self.line:flush(2)
end

--- Does what the parent says, from now on.
---@param host moonrabbit.life.Host
---@param log function
---@param metrics moonrabbit.Metrics?
function Worker:serve(host, log, metrics)
  self.host, self.log, self.metrics = host, log, metrics
  for _, name in ipairs { "INT", "TERM" } do self.runtime.signal(name, function() host:stop() end) end
  self.runtime.signal("HUP", function() end)
  self.line:send "hello"
  self.runtime.spawn(listen, self)
end

return worker
