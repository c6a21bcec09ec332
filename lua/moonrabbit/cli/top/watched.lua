--- What `moonrabbit top` watches: its sources, what they have told, and how that is written.

local api = require "moonrabbit.cli.api"
local credentials = require "moonrabbit.cli.credentials"
local figures = require "moonrabbit.cli.top.figures"
local json = require "moonrabbit.cli.json"
local output = require "moonrabbit.cli.output"
local screen = require "moonrabbit.cli.top.screen"
local sources = require "moonrabbit.cli.top.sources"

---@class moonrabbit.cli.Top
---@field metrics moonrabbit.cli.Source[]
---@field management moonrabbit.cli.Source?
---@field note string?
---@field sort string
---@field reverse boolean
local Top = {}
Top.__index = Top

local watched = {}

--- Where an app serves its metrics unless it is told otherwise.
watched.USUAL = "http://127.0.0.1:9419"

-- The vhost's queues, or why they are not asked for.
local function management_of(args, runtime, timeout)
  if args.no_management then return nil end
  local _, parsed = credentials.resolve(args)
  local client, problem = api.client(args)
  if not client then return nil, problem end
  client.timeout = timeout
  return sources.management(runtime, client, parsed.vhost)
end

--- What the arguments ask for; nil and what is wrong with them.
---@param args table
---@param runtime table
---@return moonrabbit.cli.Top|nil, string? problem
function watched.new(args, runtime)
  local self = setmetatable({
    args = args, runtime = runtime, metrics = {}, sort = args.sort, reverse = args.reverse or false,
    wake = runtime.condition(), code = nil,
  }, Top)
  local timeout, given = args.timeout or 5, args.metrics or {}
  for i, address in ipairs(#given > 0 and given or { sources.address(watched.USUAL) }) do
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

return watched
