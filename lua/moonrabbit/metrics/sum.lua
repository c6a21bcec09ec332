--- The sum of several pages of metrics: what a parent of workers serves, or any worker of nginx.
--
-- Samples with the same name and labels are added; gauges too, so "in flight" is that of all workers, and
-- `moonrabbit_connection_up` says how many of `moonrabbit_connections` are up. What is the broker's own and every worker
-- sees (families.shared) is not added: the largest counts.
-- @module moonrabbit.metrics.sum

local families = require "moonrabbit.metrics.families"
local numbers = require "moonrabbit.metrics.numbers"

local sum = {}

-- The family that a sample belongs to, given the families that were announced by # TYPE.
local function family_of(page, name)
  if page.families[name] then return page.families[name] end
  local base = name:match "^(.*)_bucket$" or name:match "^(.*)_sum$" or name:match "^(.*)_count$"
  local found = base and page.families[base]
  if found and (found.type == "histogram" or found.type == "summary") then return found end
  return page.open(name)
end

local function new_page()
  local page = { families = {}, order = {} }
  function page.open(name)
    local found = page.families[name]
    if not found then
      found = { name = name, samples = {}, order = {} }
      page.families[name] = found
      page.order[#page.order + 1] = name
    end
    return found
  end
  return page
end

-- Where the labels of a sample end: quotes may hold anything.
local function after_labels(line, at)
  local i, quoted = at, false
  while i <= #line do
    local c = line:sub(i, i)
    if quoted and c == "\\" then
      i = i + 1
    elseif c == '"' then
      quoted = not quoted
    elseif c == "}" and not quoted then
      return i + 1
    end
    i = i + 1
  end
end

local function split(line)
  local name = line:match "^[%a_:][%w_:]*"
  if not name then return nil end
  local from = #name + 1
  if line:sub(from, from) == "{" then from = after_labels(line, from + 1) end
  local value = from and line:sub(from):match "^%s+(%S+)"
  return name, from and line:sub(1, from - 1), value and numbers.read(value)
end

local function read_line(page, line)
  local what, name, rest = line:match "^# (%u+) ([%w_:]+) ?(.*)$"
  if what == "HELP" then
    page.open(name).help = page.open(name).help or rest
  elseif what == "TYPE" then
    page.open(name).type = page.open(name).type or rest
  elseif line:sub(1, 1) ~= "#" and line ~= "" then
    local sample, key, value = split(line)
    if not value then return end
    local family = family_of(page, sample)
    local before = family.samples[key]
    if before then
      family.samples[key] = families.shared[family.name] and math.max(before, value) or before + value
    else
      family.samples[key] = value
      family.order[#family.order + 1] = key
    end
  end
end

local function read_page(page, text)
  for line in (text .. "\n"):gmatch "(.-)\n" do read_line(page, line) end
end

local function read(texts)
  local page = new_page()
  for _, text in ipairs(texts) do read_page(page, text) end
  return page
end

local LASTING = { counter = true, histogram = true }

-- Fractions added in another order may come to a hair less, which Prometheus takes for a restart.
local function never_less(key, value, highest)
  local before = highest[key]
  if before and before > value then return before end
  highest[key] = value
  return value
end

local function write_family(out, family, highest)
  if #family.order == 0 then return end
  if family.help then out[#out + 1] = "# HELP " .. family.name .. " " .. family.help end
  if family.type then out[#out + 1] = "# TYPE " .. family.name .. " " .. family.type end
  local rises = highest and LASTING[family.type]
  for _, key in ipairs(family.order) do
    local value = family.samples[key]
    if rises then value = never_less(key, value, highest) end
    out[#out + 1] = key .. " " .. numbers.write(value)
  end
end

local function write(page, wanted, highest)
  local out = {}
  table.sort(page.order)
  for _, name in ipairs(page.order) do
    local family = page.families[name]
    if not wanted or wanted[family.type] then write_family(out, family, highest) end
  end
  if #out == 0 then return "" end
  return table.concat(out, "\n") .. "\n"
end

--- Adds pages up. Families come in the order of their names; their samples in the order in which they first appear.
---@param texts string[]
---@param highest table<string, number>? kept from call to call: no counter falls below what it was in an earlier sum
---@return string
function sum.sum(texts, highest) return write(read(texts), nil, highest) end

--- The same, one page at a time, for who must not be busy for long: `add(text)`, `text()`.
---@return { add: fun(text: string), text: fun(): string }
function sum.adder()
  local page = new_page()
  return {
    add = function(text) read_page(page, text) end,
    text = function() return write(page) end,
  }
end

--- What is left of a page when its process has ended: its counters and histograms. Added to the sum from
--- then on it keeps them from falling, which Prometheus would take for a restart.
---@param text string
---@return string
function sum.lasting(text) return write(read { text }, LASTING) end

return sum
