--- What all workers of one nginx have done, on one page: any of them answers with the sum.
--
--     lua_shared_dict moonrabbit 1m;
--     init_worker_by_lua_block { require "moonrabbit.resty".start { uri = …, metrics = "moonrabbit" } }
--     location = /metrics { content_by_lua_block { require "moonrabbit.resty.metrics".serve() } }
--     location = /readyz  { content_by_lua_block { require "moonrabbit.resty.metrics".readyz() } }
--     location = /healthz { content_by_lua_block { require "moonrabbit.resty.metrics".healthz() } }
--
-- Each worker counts for itself, and puts its page into the dictionary `EVERY` seconds after something has happened
-- (and before it answers); one that is idle does not wake up for it. A crash takes what it did since its last page.
-- moonrabbit.resty.metrics.slots is how the workers share the dictionary.
-- @module moonrabbit.resty.metrics

local Slots = require "moonrabbit.resty.metrics.slots"
local json = require "moonrabbit.cli.json"
local kept_connection = require "moonrabbit.resty.metrics.kept"
local life = require "moonrabbit.resty.life"
local moonrabbit_metrics = require "moonrabbit.metrics"
local observer = require "moonrabbit.metrics.observer"
local runtime = require "moonrabbit.runtime.resty"
local sum = require "moonrabbit.metrics.sum"

local metrics = {}

local cached_now = ngx.now -- of nginx's turn: cheap enough to be asked for each message

-- Seconds after which what has happened is on the page of a worker.
local EVERY = 1
-- The same in a worker that leaves.
local SOON = 0.1

local TEXT = "text/plain; version=0.0.4; charset=utf-8"

---@class moonrabbit.resty.Metrics
---@field metrics moonrabbit.Metrics  this worker's
local Shared = {}
Shared.__index = Shared

local worker -- this worker's

-- ---- A worker's own page ----------------------------------------------------------------------------

-- What is missing for this worker to be ready, a line for each: name, tab, reason.
local function missing(self)
  local lines = {}
  for _, each in ipairs(self.metrics.checks.ready) do
    local ok, good, reason = pcall(each.check)
    if not ok then good, reason = nil, "the check threw: " .. tostring(good) end
    if not good then
      lines[#lines + 1] = ("%s\t%s\n"):format(each.name, (tostring(reason or "not ready"):gsub("%c", " ")))
    end
  end
  return table.concat(lines)
end

-- What of a page outlives its worker, in about half the room: the others know what its families are for.
local function brief(page) return (sum.lasting(page):gsub("# HELP [^\n]*\n", "")) end

--- Puts the page of this worker into the dictionary. One that leaves may have no other chance: what it has counted goes
--- where its page stood, if there is no room for a larger one.
---@return boolean whole  false: it does not fit
function Shared:write()
  local page = self.metrics:text()
  if not life.exiting then return self.slots:put(page, missing(self)) end
  return self.slots:put(page, Slots.LEAVING) or self.slots:put(brief(page), Slots.LEAVING)
end

local function on_timer(premature, self)
  life.look()
  if not premature and life.exiting then ngx.sleep(SOON) end
  self.due = 0
  if not self:write() and not life.exiting then self:touch() end
end

--- Something has happened: it is on the page soon. May be called in every phase.
function Shared:touch()
  local at = cached_now()
  if at < self.due then return end
  -- A worker that leaves takes timers without a delay only.
  local ok = life.timer_at(life.exiting and 0 or EVERY, on_timer, self)
  self.due = ok and at + EVERY + life.LATE or 0
end

-- ---- The pages of all -------------------------------------------------------------------------------

--- The page of all workers. It waits: others run between the pages.
---@return string|nil page, string? problem
function Shared:page()
  self:write()
  local pages, problem = self.slots:pages()
  if not pages then return nil, problem end
  local all = sum.adder()
  for _, page in ipairs(pages) do
    all.add(page)
    runtime.sleep(0)
  end
  return all.text()
end

--- What is missing for all workers to be ready: nothing, or a list of { worker, name, reason }. It waits. The
--- checks are asked in each worker when something happens there, and in this one now.
---@return table[]|nil missing, string? problem
function Shared:missing()
  self:write()
  local all, seen = {}, {}
  local ok, problem = self.slots:lacks(function(number, lines)
    seen[number] = true
    for name, reason in lines:gmatch "(.-)\t(.-)\n" do
      all[#all + 1] = { worker = number, name = name, reason = reason }
    end
  end)
  if not ok then return nil, problem end
  for number = 0, ngx.worker.count() - 1 do
    if not seen[number] then all[#all + 1] = { worker = number, name = "worker", reason = "it has not started" } end
  end
  return all
end

-- ---- What is measured -------------------------------------------------------------------------------

--- Measures a connection that is kept: tell what is returned when it stands and when it is lost.
---@param name string the label
---@return { opened: fun(self, connection: moonrabbit.Connection), lost: fun(self, err: moonrabbit.Error?) }
function Shared:connection(name)
  local kept = kept_connection.new(self)
  self.metrics:watch(kept, name)
  self.metrics:ready("connection " .. name, function()
    if kept.connection and kept.connection:is_open() then return true end
    return nil, kept.reason and tostring(kept.reason) or "connecting"
  end)
  return kept
end

-- The kinds of errors that a worker's queue has counted; those whose callers gave up are timeouts.
local function errors_of(outbound)
  local all = { overflow = outbound.overflows, timeout = outbound.timeouts }
  for kind, n in pairs(outbound.failures) do all[kind] = (all[kind] or 0) + n end
  return all
end

--- Measures what a worker publishes.
---@param outbound moonrabbit.resty.Outbound
---@param name string the label
function Shared:outbound(outbound, name)
  local families, count = self.metrics.families, (self.labels[name] or 0) + 1
  self.labels[name] = count
  if count > 1 then name = name .. "-" .. count end
  local function series(family) return families[family]:with(name) end
  local taken, resent = series "publishes_total", series "publishes_resent_total"
  local unconfirmed, bytes = series "publisher_unconfirmed", series "publisher_bytes"
  series("publisher_window"):set(outbound.entries)
  self.metrics.registry:collect(function()
    taken.value, resent.value = outbound.published, outbound.resent
    for kind, n in pairs(errors_of(outbound)) do families.publish_errors_total:with(name, kind).value = n end
    unconfirmed:set(outbound.count)
    bytes:set(outbound.bytes)
  end)
  outbound.metrics, outbound.seconds = self, series "publish_seconds"
end

--- Measures an app: the table for its `observer`, which tells `also` the same.
---@param app moonrabbit.App
---@param also table? another observer
---@return table
function Shared:observer(app, also)
  for _, consumer in ipairs(app.plan.consumers) do observer.prepare(self.metrics.families, consumer.queue) end
  self.metrics:ready("app " .. app.name, function()
    if app.state == "running" then return true end
    return nil, app.state
  end)
  local all = self.metrics:observer(also)
  for _, name in ipairs { "delivered", "settled", "event" } do
    local fn = all[name]
    all[name] = function(...)
      self:touch()
      return fn(...)
    end
  end
  return all
end

-- ---- One for a worker -------------------------------------------------------------------------------

--- The metrics of this worker; the first call, in init_worker_by_lua*, makes them.
---@param name string of the `lua_shared_dict`
---@return moonrabbit.resty.Metrics
function metrics.open(name)
  if worker then
    if worker.name ~= name then error(("the metrics of this worker are in '%s' already"):format(worker.name), 0) end
    return worker
  end
  worker = setmetatable({
    name = name, slots = Slots.open(name), labels = {}, due = 0,
    metrics = moonrabbit_metrics.new { log = runtime.log },
  }, Shared)
  worker:touch()
  life.on_exit(function() worker:write() end)
  return worker
end

--- The metrics of this worker, which `start { metrics = … }` has made: `metrics` is a moonrabbit.Metrics, for counters
--- and checks of your own; after a change of them call `touch()`, or the other workers learn of it late.
---@return moonrabbit.resty.Metrics
function metrics.worker()
  if worker then return worker end
  error("moonrabbit.resty.metrics: call moonrabbit.resty.start { metrics = \"…\" } in init_worker_by_lua* first", 2)
end

-- ---- Requests ---------------------------------------------------------------------------------------

local function answer(status, kind, text)
  local method = ngx.req.get_method()
  if method ~= "GET" and method ~= "HEAD" then
    ngx.header["Allow"] = "GET, HEAD"
    status, kind, text = 405, "text/plain", "GET or HEAD\n"
  end
  ngx.status = status
  ngx.header["Content-Type"], ngx.header["Content-Length"] = kind, #text
  ngx.print(text)
end

local function answer_checks(word, list)
  for i, each in ipairs(list) do list[i] = { worker = each.worker, name = each.name, reason = each.reason } end
  local good = #list == 0
  answer(good and 200 or 503, "application/json",
    json.encode { [word] = good, missing = not good and list or nil } .. "\n")
end

local function fail(problem)
  runtime.log("error", "metrics: " .. problem)
  answer(500, "text/plain", "it could not be made: see the log\n")
end

--- content_by_lua*: the page of all workers, for Prometheus.
function metrics.serve()
  local page, problem = metrics.worker():page()
  if not page then return fail(problem) end
  answer(200, TEXT, page)
end

--- content_by_lua*: 200 when every worker is connected and its apps run; 503, and what is missing in which.
function metrics.readyz()
  local list, problem = metrics.worker():missing()
  if not list then return fail(problem) end
  answer_checks("ready", list)
end

--- content_by_lua*: 200 as long as this worker answers, unless a check of your own says otherwise
--- (moonrabbit.Metrics:healthy).
function metrics.healthz()
  local list = {}
  for _, each in ipairs(metrics.worker().metrics.checks.health) do
    local ok, good, reason = pcall(each.check)
    if not ok then good, reason = nil, "the check threw: " .. tostring(good) end
    if not good then list[#list + 1] = { name = each.name, reason = tostring(reason or "not healthy") } end
  end
  answer_checks("healthy", list)
end

return metrics
