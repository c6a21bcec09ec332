--- Reads a page of metrics in the text format of Prometheus, and refuses what is none.
--
-- https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
-- @module moonrabbit.metrics.read

local numbers = require "moonrabbit.metrics.numbers"

local read = {}

local escapes = { ["\\\\"] = "\\", ['\\"'] = '"', ["\\n"] = "\n" }

-- The labels that begin at `at`, behind the brace: a table, and where the line goes on; nil when they are none.
local function read_labels(line, at)
  local labels = {}
  while true do
    local closed = line:match("^%s*}()", at)
    if closed then return labels, closed end
    local name, from = line:match('^%s*([%a_][%w_]*)%s*=%s*"()', at)
    if not name then return nil end
    local to = from
    while true do
      local stop = line:find('["\\]', to)
      if not stop then return nil end
      if line:sub(stop, stop) == '"' then
        to = stop
        break
      end
      to = stop + 2
    end
    labels[name] = line:sub(from, to - 1):gsub('\\[\\"n]', escapes)
    at = line:match("^%s*,()", to + 1) or to + 1
  end
end

-- name, labels, value of a sample; nil when it is none.
local function read_sample(line)
  local name, at = line:match "^%s*([%a_:][%w_:]*)%s*()"
  if not name then return nil end
  local labels = {}
  if line:sub(at, at) == "{" then
    labels, at = read_labels(line, at + 1)
    if not labels then return nil end
  end
  local text, rest = line:match("^%s*(%S+)%s*(.-)%s*$", at)
  local value = text and numbers.read(text)
  if not value or not (rest == "" or rest:find "^%-?%d[%d.]*$" or rest:find "#") then return nil end
  return name, labels, value
end

local function excerpt(line) return (line:sub(1, 40):gsub("[^\32-\126]", "?")) end

---@alias moonrabbit.metrics.Sample { labels: table<string, string>, value: number }

--- The samples of a page, by name: each with its labels and value; nil and what is wrong, with the line.
---@param text string
---@return table<string, moonrabbit.metrics.Sample[]>|nil, string?
function read.page(text)
  local samples, number = {}, 0
  for line in (text .. "\n"):gmatch "(.-)\r?\n" do
    number = number + 1
    if line:find "%S" and not line:find "^%s*#" then
      local name, labels, value = read_sample(line)
      if not name then return nil, ("line %d is no metric: '%s'"):format(number, excerpt(line)) end
      local list = samples[name]
      if not list then
        list = {}
        samples[name] = list
      end
      list[#list + 1] = { labels = labels, value = value }
    end
  end
  return samples
end

return read
