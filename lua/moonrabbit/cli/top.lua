--- moonrabbit top

local api = require "moonrabbit.cli.api"
local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local figures = require "moonrabbit.cli.top.figures"
local json = require "moonrabbit.cli.json"
local output = require "moonrabbit.cli.output"
local protect = require "moonrabbit.protect"
local screen = require "moonrabbit.cli.top.screen"
local sources = require "moonrabbit.cli.top.sources"
local terminal = require "moonrabbit.cli.top.terminal"

local top = {
  summary = "Watch queues live: rates, latencies, in flight, retries, dead letters.",
  epilog = "Joins the metrics of running apps (moonrabbit run --metrics, mr.metrics.serve) with the queues of the "
    .. "management API. What is away is said, and asked again. On no terminal it writes a table every interval. "
    .. "Keys: q ends, s sorts by the next column, r turns the order.",
}

local USUAL = "http://127.0.0.1:9419"

-- ---- Arguments --------------------------------------------------------------------------------------

local function interval(text)
  local n = tonumber(text)
  if not n or not (n >= 0.1 and n <= 3600) then return nil, ("'%s' is no number from 0.1 to 3600"):format(text) end
  return n
end

local function sort_key(text)
  if figures.sort_keys[text] then return text end
  return nil, ("there is no column '%s' to sort by: %s"):format(text, table.concat(figures.sort_order, ", "))
end

function top.build(command, common)
  command:option "--metrics" :argname "<url>" :count "*" :convert(sources.address)
    :description("Where an app serves its metrics: http://host:port; may be repeated, and is added up. By default "
      .. USUAL .. ".")
  api.add_option(command)
  command:flag "--no-management" :description "Do not ask the management API."
  command:option "--interval" :argname "<seconds>" :convert(interval) :default "2" :description "Between two looks (2)."
  command:flag "--once" :description "Look twice, an interval apart, write what was seen, and end."
  command:option "--sort" :argname "<column>" :convert(sort_key) :default "in"
    :description("One of " .. table.concat(figures.sort_order, ", ") .. ".")
  command:flag "--reverse" :description "The other way round."
  command:option "--queue" :argname "<text>" :description "Only queues whose names hold this."
  common(command)
end

-- ---- What is watched --------------------------------------------------------------------------------

---@class moonrabbit.cli.Top
---@field metrics moonrabbit.cli.Source[]
---@field management moonrabbit.cli.Source?
---@field note string?
---@field sort string
---@field reverse boolean
local Top = {}
Top.__index = Top

-- The vhost's queues, or why they are not asked for.
local function management_of(args, runtime, timeout)
  if args.no_management then return nil end
  local _, parsed = credentials.resolve(args)
  local client, problem = api.client(args)
  if not client then return nil, problem end
  client.timeout = timeout
  return sources.management(runtime, client, parsed.vhost)
end

local function new(args, runtime)
  local self = setmetatable({
    args = args, runtime = runtime, metrics = {}, sort = args.sort, reverse = args.reverse or false,
    wake = runtime.condition(), code = nil,
  }, Top)
  local timeout, given = args.timeout or 5, args.metrics or {}
  for i, address in ipairs(#given > 0 and given or { sources.address(USUAL) }) do
    self.metrics[i] = sources.metrics(runtime, address, timeout)
  end
  local problem
  self.management, problem = management_of(args, runtime, timeout)
  if problem and args.management then return nil, problem end
  self.note = problem and "management  not asked: " .. problem
  self.sources = { self.management }
  for _, source in ipairs(self.metrics) do self.sources[#self.sources + 1] = source end
  return self
end

local function matching(rows, text)
  if not text then return rows end
  local kept = {}
  for _, row in ipairs(rows) do
    if row.queue:find(text, 1, true) then kept[#kept + 1] = row end
  end
  return kept
end

--- What is known now.
function Top:figures()
  local looks = {}
  for _, source in ipairs(self.metrics) do
    if source.now then looks[#looks + 1] = { before = source.before, now = source.now } end
  end
  local management = self.management
  local found = figures.all(looks, management and management.now and management.now.queues)
  found.queues = matching(found.queues, self.args.queue)
  return found
end

-- ---- As text and as JSON ----------------------------------------------------------------------------

function Top:lines(width, height, keys)
  return screen.lines {
    time = os.date "%H:%M:%S", every = self.args.interval, metrics = self.metrics, management = self.management,
    note = self.note, figures = self:figures(), sort = self.sort, reverse = self.reverse, keys = keys, width = width,
    height = height,
  }
end

local function source_object(source)
  return source and { address = source.name, ok = source.problem == nil and source.looks > 0, problem = source.problem }
end

local function list(items) return setmetatable(items, json.list) end

function Top:object()
  local found, metrics = self:figures(), {}
  for i, source in ipairs(self.metrics) do metrics[i] = source_object(source) end
  return {
    time = os.date "!%Y-%m-%dT%H:%M:%SZ", metrics = list(metrics), management = source_object(self.management),
    connections = found.connections, publishers = list(found.publishers), ladders = list(found.ladders),
    queues = list(figures.sort(found.queues, self.sort, self.reverse)),
  }
end

--- Writes it once; nil, err where nobody takes it any more.
function Top:write()
  if output.is_json() then
    output.write(json.encode(self:object()), "\n")
  else
    for _, line in ipairs(self:lines(tonumber(os.getenv "COLUMNS" or "") or 100)) do
      output.write((line.text:gsub(" +$", "")), "\n")
    end
    if not self.args.once then output.write "\n" end
  end
  return output.flush()
end

-- ---- Not on a terminal ------------------------------------------------------------------------------

-- All sources at once; ends early when it is to stop.
local function look_at_all(self)
  local left = #self.sources
  for _, source in ipairs(self.sources) do
    self.runtime.spawn(function()
      source:look()
      left = left - 1
      self.wake:broadcast()
    end)
  end
  while left > 0 and not self.code do self.wake:wait() end
end

local function pause(self, seconds)
  local now = self.runtime.now
  local due = now() + seconds
  while now() < due and not self.code do self.wake:wait(due - now()) end
end

-- The code of what was asked for by name and could not be had; also where there is nothing at all.
local function verdict(self)
  local named, any, first = #(self.args.metrics or {}) > 0, false, nil
  for _, source in ipairs(self.sources) do
    if source.problem then
      local wanted = source ~= self.management and named or source == self.management and self.args.management
      if wanted and not first then first = source end
    else
      any = true
    end
  end
  if not any then first = first or self.sources[#self.sources] end
  return first and connect.exit_code(first.err, true) or exit.ok
end

local function once(self)
  look_at_all(self)
  if not self.code then pause(self, self.args.interval) end
  if not self.code then look_at_all(self) end
  if self.code then return self.code end
  for _, source in ipairs(self.sources) do
    if source.problem then output.complain(("%s: %s"):format(source.name, source.problem)) end
  end
  self:write()
  return verdict(self)
end

local function plain(self)
  while not self.code do
    local due = self.runtime.now() + self.args.interval
    look_at_all(self)
    if self.code or not self:write() then break end
    pause(self, math.max(0.05, due - self.runtime.now()))
  end
  return self.code or exit.failed
end

-- ---- On a terminal ----------------------------------------------------------------------------------

local function next_key(sort)
  local order = figures.sort_order
  for i, key in ipairs(order) do
    if key == sort then return order[i % #order + 1] end
  end
end

local actions = {
  q = function(self) self.code = exit.ok end,
  s = function(self) self.sort = next_key(self.sort) end,
  r = function(self) self.reverse = not self.reverse end,
}

local function looks(self)
  local count = 0
  for _, source in ipairs(self.sources) do count = count + source.looks end
  return count
end

-- Seconds between two looks at the keys.
local KEYS = 0.1

local function watch(self, term)
  local now, colourless = self.runtime.now, (os.getenv "NO_COLOR" or "") ~= ""
  local seen, due = nil, 0
  for _, source in ipairs(self.sources) do source:keep_looking(self.args.interval) end
  while not self.code do
    local changed = false
    for key in term:keys():gmatch "." do
      if actions[key] then
        actions[key](self)
        changed = true
      end
    end
    if self.resized then self.width, self.height, self.resized = nil, nil, false end
    if not self.width then
      self.width, self.height = terminal.size()
      changed = true
    end
    if changed or seen ~= looks(self) or now() >= due then
      seen, due = looks(self), now() + math.max(1, self.args.interval)
      local ok = term:draw(self:lines(self.width, self.height, term:has_keys()), colourless)
      if not ok then return exit.failed end
    end
    if not self.code then self.wake:wait(KEYS) end
  end
  return self.code
end

local function live(self)
  self.runtime.signal("WINCH", function()
    self.resized = true
    self.wake:broadcast()
  end)
  local term = terminal.open()
  local ok, code = protect(watch, self, term)
  term:restore()
  self.runtime.signal("WINCH", nil)
  if not ok then error(code, 0) end
  return code
end

-- ---- All of it --------------------------------------------------------------------------------------

function top.run(args)
  local runtime = require "moonrabbit.runtime.native"
  local options, problem = credentials.resolve(args)
  if not options then
    output.complain(problem)
    return exit.usage
  end
  local self
  self, problem = new(args, runtime)
  if not self then
    output.complain(problem)
    return exit.usage
  end
  local function stop(code)
    self.code = self.code or code
    self.wake:broadcast()
  end
  local off = connect.on_stop(stop)
  runtime.signal("HUP", function() stop(exit.terminated) end)
  local way = args.once and once or not output.is_json() and terminal.is_stdout() and live or plain
  local code = way(self)
  runtime.signal("HUP", nil)
  off()
  return code
end

return top
