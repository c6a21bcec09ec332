--- What the handlers of chaos/kills do: a row for each message, in a table that takes any number of them. So what was done
-- twice is there twice, to be counted.
local effects = {}

local Effects = {}
Effects.__index = Effects

local function execute(self, statement)
  local result, problem = self.connection:execute(statement)
  if not result then error(("%s: %s"):format(statement, tostring(problem)), 2) end
  return result
end

-- What answers with a row is a cursor to be closed.
local function pragma(self, text)
  local result = execute(self, "PRAGMA " .. text)
  if type(result) ~= "number" then result:close() end
end

--- where: { driver = "sqlite3", source = path } or { driver = "postgres", source, user, host }.
function effects.open(where)
  local environment = require("luasql." .. where.driver)[where.driver]()
  local self = setmetatable({ environment = environment }, Effects)
  if where.driver == "sqlite3" then
    self.connection = assert(environment:connect(where.source, 10000))
    pragma(self, "synchronous = NORMAL")
  else
    self.connection = assert(environment:connect(where.source, where.user, "", where.host))
  end
  return self
end

--- Once, before anybody else.
function Effects:create(driver)
  if driver == "sqlite3" then pragma(self, "journal_mode = WAL") end
  execute(self, "CREATE TABLE effects (message INTEGER NOT NULL, attempt INTEGER NOT NULL)")
end

--- A message's effect.
function Effects:add(message, attempt)
  execute(self, ("INSERT INTO effects (message, attempt) VALUES (%d, %d)"):format(message, attempt))
end

--- The number that a query answers.
function Effects:number(query)
  local cursor = execute(self, query)
  local value = cursor:fetch()
  cursor:close()
  return tonumber(value)
end

--- How many messages have had an effect.
function Effects:messages() return self:number "SELECT COUNT(DISTINCT message) FROM effects" end

--- message -> how many effects it has had.
function Effects:by_message()
  local all = {}
  local cursor = execute(self, "SELECT message, COUNT(*) FROM effects GROUP BY message")
  local message, count = cursor:fetch()
  while message do
    all[tonumber(message)] = tonumber(count)
    message, count = cursor:fetch()
  end
  cursor:close()
  return all
end

function Effects:close()
  self.connection:close()
  self.environment:close()
end

return effects
