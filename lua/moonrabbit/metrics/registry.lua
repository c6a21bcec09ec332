--- Registry: counters, gauges and histograms, and their text for Prometheus.
--
--     local registry = Registry.new()
--     local sent = registry:counter("shop_orders_total", "Orders sent.", { "country" })
--     local germany = sent:with "de"     -- resolved once …
--     germany:inc()                      -- … then an addition, and nothing else
--
-- A family has at most `max_series` combinations of label values. What comes after that is counted under the value
-- "other", so that no input can grow the process, or Prometheus. Labels whose values are few by nature (`closed`)
-- keep them even then.
--
-- https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
-- @module moonrabbit.metrics.registry

local numbers = require "moonrabbit.metrics.numbers"

local concat, sort = table.concat, table.sort
local unpack = table.unpack or unpack -- luacheck: ignore 143 113

local MAX_SERIES = 200
--- A label's value is cut to so many bytes.
local MAX_VALUE = 128

-- ---- Series -----------------------------------------------------------------------------------------

---@class moonrabbit.metrics.Counter
---@field value number
local Counter = {}
Counter.__index = Counter

--- Counts.
---@param n number? 1 by default; 0 or more
function Counter:inc(n) self.value = self.value + (n or 1) end

---@class moonrabbit.metrics.Gauge
---@field value number
local Gauge = {}
Gauge.__index = Gauge

---@param value number
function Gauge:set(value) self.value = value end
---@param n number? 1 by default
function Gauge:inc(n) self.value = self.value + (n or 1) end
---@param n number? 1 by default
function Gauge:dec(n) self.value = self.value - (n or 1) end

---@class moonrabbit.metrics.Histogram
---@field bounds number[]  upper bounds of its buckets, without the last one, +Inf
---@field counts integer[] how many fell into each, not cumulated; one more than bounds
---@field sum number
local Histogram = {}
Histogram.__index = Histogram

--- Notes a value.
---@param value number
function Histogram:observe(value)
  local bounds, counts = self.bounds, self.counts
  local low, high = 1, value <= self.least and 1 or #counts -- most values are small ones
  while low < high do
    local middle = (low + high - (low + high) % 2) / 2
    if value <= bounds[middle] then high = middle else low = middle + 1 end
  end
  counts[low] = counts[low] + 1
  self.sum = self.sum + value
end

-- ---- Families ---------------------------------------------------------------------------------------

---@class moonrabbit.metrics.Family
---@field name string
---@field type "counter"|"gauge"|"histogram"
---@field help string
---@field labels string[]
local Family = {}
Family.__index = Family

local escapes = { ["\\"] = "\\\\", ["\n"] = "\\n", ['"'] = '\\"' }

--- A label's value as it stands between quotes.
---@param value string
---@return string
local function escape(value) return (value:gsub('[\\\n"]', escapes)) end

-- Text that is UTF-8 stays; else every byte over 127 becomes "?", for Prometheus refuses the whole page.
local function clean(value)
  value = tostring(value)
  if #value > MAX_VALUE then value = value:sub(1, MAX_VALUE) end
  if value:find "[\128-\255]" and not require("moonrabbit.cli.json").is_utf8(value) then
    value = value:gsub("[\128-\255]", "?")
  end
  return value
end

local function label_text(self, values)
  local parts = {}
  for i, name in ipairs(self.labels) do parts[i] = name .. '="' .. escape(values[i]) .. '"' end
  return concat(parts, ",")
end

local function new_series(self)
  if self.type == "counter" then return setmetatable({ value = 0 }, Counter) end
  if self.type == "gauge" then return setmetatable({ value = 0 }, Gauge) end
  local counts = {}
  for i = 1, #self.bounds + 1 do counts[i] = 0 end
  return setmetatable({ bounds = self.bounds, least = self.bounds[1] or -math.huge, counts = counts, sum = 0 },
    Histogram)
end

local function add(self, values)
  local text = label_text(self, values)
  local found = self.series[text]
  if found then return found end
  local series = new_series(self)
  self.series[text] = series
  self.order[#self.order + 1] = text
  self.sorted = false
  return series
end

--- The series with these label values, in the order of the family's labels. Keep it: finding it makes strings.
---@param ... any
---@return table series
---@return boolean own   false: the family is full, and these are counted as "other"
function Family:with(...)
  local n = select("#", ...)
  if n ~= #self.labels then
    error(("%s has %d labels, not %d"):format(self.name, #self.labels, n), 2)
  end
  local values = { ... }
  for i = 1, n do values[i] = clean(values[i]) end
  local found = self.series[label_text(self, values)]
  if found then return found, true end
  if #self.order < self.max_series then return add(self, values), true end
  for i, name in ipairs(self.labels) do
    if not self.closed[name] then values[i] = "other" end
  end
  return add(self, values), false
end

--- Takes a series off the page, such as that of a connection that is closed for good.
---@param ... any label values
function Family:remove(...)
  local values = { ... }
  for i = 1, #values do values[i] = clean(values[i]) end
  local text = label_text(self, values)
  if not self.series[text] then return end
  self.series[text] = nil
  for i = #self.order, 1, -1 do
    if self.order[i] == text then table.remove(self.order, i) end
  end
end

-- ---- Text -------------------------------------------------------------------------------------------

local function line(out, name, labels, value)
  out[#out + 1] = labels == "" and name .. " " .. numbers.write(value)
    or name .. "{" .. labels .. "} " .. numbers.write(value)
end

local function histogram_text(out, name, labels, series)
  local before, total = labels == "" and "" or labels .. ",", 0
  for i, count in ipairs(series.counts) do
    total = total + count
    local bound = series.bounds[i]
    line(out, name .. "_bucket", before .. 'le="' .. (bound and numbers.write(bound) or "+Inf") .. '"', total)
  end
  line(out, name .. "_sum", labels, series.sum)
  line(out, name .. "_count", labels, total)
end

local help_escapes = { ["\\"] = "\\\\", ["\n"] = "\\n" }

function Family:write(out)
  if #self.order == 0 then return end
  if not self.sorted then
    sort(self.order)
    self.sorted = true
  end
  out[#out + 1] = "# HELP " .. self.name .. " " .. self.help:gsub("[\\\n]", help_escapes)
  out[#out + 1] = "# TYPE " .. self.name .. " " .. self.type
  for _, text in ipairs(self.order) do
    local series = self.series[text]
    if self.type == "histogram" then
      histogram_text(out, self.name, text, series)
    else
      line(out, self.name, text, series.value)
    end
  end
end

-- ---- Registry ---------------------------------------------------------------------------------------

---@class moonrabbit.metrics.Registry
local Registry = {}
Registry.__index = Registry

---@class moonrabbit.metrics.RegistryOptions
---@field max_series integer?             for each family; 200 by default
---@field log fun(level: string, text: string)?  hears of a collector that throws

---@param opts moonrabbit.metrics.RegistryOptions?
---@return moonrabbit.metrics.Registry
function Registry.new(opts)
  opts = opts or {}
  return setmetatable({
    families = {}, names = {}, collectors = {}, max_series = opts.max_series or MAX_SERIES, log = opts.log,
  }, Registry)
end

---@class moonrabbit.metrics.FamilyOptions
---@field max_series integer?  the registry's by default
---@field closed string[]?     labels whose values are few by nature
---@field bounds number[]?     of a histogram: the upper bounds of its buckets, rising

local function check_labels(what, labels)
  for _, label in ipairs(labels) do
    if not label:find "^[%a_][%w_]*$" or label:sub(1, 2) == "__" or label == "le" then
      error(what .. ": '" .. label .. "' cannot be a label's name", 4)
    end
  end
end

local function check_bounds(what, bounds)
  for i, bound in ipairs(bounds) do
    if type(bound) ~= "number" or i > 1 and bound <= bounds[i - 1] then
      error(what .. ": the bounds must be numbers that rise", 4)
    end
  end
end

local function family(self, kind, name, help, labels, opts)
  if type(name) ~= "string" or not name:find "^[%a_:][%w_:]*$" then
    error(("Registry:%s: '%s' cannot be a metric's name"):format(kind, tostring(name)), 3)
  end
  local found = self.families[name]
  if found then
    if found.type ~= kind then
      error(("Registry:%s: '%s' is a %s already"):format(kind, name, found.type), 3)
    end
    return found
  end
  labels, opts = labels or {}, opts or {}
  check_labels("Registry:" .. kind, labels)
  if opts.bounds then check_bounds("Registry:" .. kind, opts.bounds) end
  local closed = {}
  for _, label in ipairs(opts.closed or {}) do closed[label] = true end
  found = setmetatable({
    name = name, type = kind, help = help or name, labels = labels, closed = closed,
    max_series = opts.max_series or self.max_series, bounds = kind == "histogram" and (opts.bounds or Registry.SECONDS),
    series = {}, order = {}, sorted = true,
  }, Family)
  self.families[name] = found
  self.names[#self.names + 1] = name
  sort(self.names)
  return found
end

--- Bounds for latencies: half a millisecond to a minute.
Registry.SECONDS = {
  0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
}

--- A family of counters; the one of that name when there is one.
---@param name string   ends in _total
---@param help string
---@param labels string[]?
---@param opts moonrabbit.metrics.FamilyOptions?
---@return moonrabbit.metrics.Family
function Registry:counter(name, help, labels, opts) return (family(self, "counter", name, help, labels, opts)) end

--- A family of gauges.
---@param name string
---@param help string
---@param labels string[]?
---@param opts moonrabbit.metrics.FamilyOptions?
---@return moonrabbit.metrics.Family
function Registry:gauge(name, help, labels, opts) return (family(self, "gauge", name, help, labels, opts)) end

--- A family of histograms.
---@param name string   with its unit: _seconds, _bytes
---@param help string
---@param labels string[]?
---@param opts moonrabbit.metrics.FamilyOptions?
---@return moonrabbit.metrics.Family
function Registry:histogram(name, help, labels, opts) return (family(self, "histogram", name, help, labels, opts)) end

--- Calls `fn` before each page is written, to set what is only then looked at. It must not wait. One that throws is
--- logged, and the page goes out without what it would have set.
---@param fn function
---@return function off takes it off again
function Registry:collect(fn)
  local list = self.collectors
  list[#list + 1] = fn
  return function()
    for i = #list, 1, -1 do
      if list[i] == fn then table.remove(list, i) end
    end
  end
end

--- The page: families in the order of their names, series in that of their labels.
---@return string
function Registry:text()
  for _, fn in ipairs({ unpack(self.collectors) }) do
    local ok, err = pcall(fn)
    if not ok and self.log then self.log("error", "a collector of metrics threw: " .. tostring(err)) end
  end
  local out = {}
  for _, name in ipairs(self.names) do self.families[name]:write(out) end
  if #out == 0 then return "" end
  return concat(out, "\n") .. "\n"
end

return Registry
