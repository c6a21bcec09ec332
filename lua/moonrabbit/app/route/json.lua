--- Fields of a message's body, which is JSON. Needs lua-cjson.
--
-- A body is decoded once, however many rules ask for its fields. What says it is JSON (its content_type)
-- and is not, is a permanent failure; what says nothing is tried; what says it is something else has no fields.
-- @module moonrabbit.app.route.json

local failure = require "moonrabbit.app.failure"

local json = {}

local cjson

--- Loads lua-cjson; nil and why there is none.
---@return table|nil, string?
function json.load()
  if cjson then return cjson end
  local ok, found = pcall(require, "cjson")
  if not ok then return nil, "reading JSON needs lua-cjson (luarocks install lua-cjson)" end
  cjson = found.new()
  cjson.decode_max_depth(200)
  return cjson
end

--- The path of a field: words, and integers for places in arrays.
---@param path string|table "customer.country", "items.1.sku", or { "items", 1, "a.b" }
---@return table
function json.path(path)
  if type(path) == "table" then return path end
  local words = {}
  for word in path:gmatch "[^.]+" do words[#words + 1] = word:find "^%d+$" and tonumber(word) or word end
  return words
end

local function says_json(content_type)
  local type = content_type:lower():match "^%s*([^;%s]+)"
  return type == "application/json" or type == "text/json" or type ~= nil and type:find("%+json$") ~= nil
end

local decoded = setmetatable({}, { __mode = "k" }) -- message -> { its value }

-- The decoded body, or nil where it is no JSON and does not say so.
local function decode(message)
  local known = decoded[message]
  if known then return known[1] end
  local content_type = message.properties.content_type
  local claims = content_type ~= nil and says_json(content_type)
  if content_type ~= nil and not claims then return nil end
  local ok, value = pcall(cjson.decode, message.body)
  if not ok then
    if not claims then
      decoded[message] = {}
      return nil
    end
    error(failure.new("permanent", ("the body is not the JSON that its content_type '%s' claims: %s"):format(
      content_type, tostring(value))), 0)
  end
  decoded[message] = { value }
  return value
end

--- The value of a field; nil where there is none, or null. A table for objects and arrays.
---@param message moonrabbit.Message
---@param path table from json.path
---@return any
function json.field(message, path)
  local value = decode(message)
  for i = 1, #path do
    if type(value) ~= "table" then return nil end
    local at = value[path[i]]
    if at == nil and type(path[i]) == "number" then at = value[tostring(path[i])] end
    value = at
  end
  if value == cjson.null then return nil end
  return value
end

return json
