--- The shop's books: a table of payments in SQLite. Nothing in it keeps a payment from being entered twice; that is the
-- business of the store that payments.lua shares this connection with.
local shop = require "shop"

local books = {}

local connection

local function execute(statement)
  local result, problem = connection:execute(statement)
  if result == nil then error(problem, 0) end
  if type(result) ~= "number" then result:close() end
end

--- The connection, for dedupe.sql: its transaction is ours.
function books.connection()
  if connection then return connection end
  local problem
  connection, problem = require("luasql.sqlite3").sqlite3():connect(shop.path "books.db", 5000)
  if not connection then return nil, problem end
  execute "PRAGMA journal_mode = WAL"
  execute "PRAGMA synchronous = NORMAL" -- a killed process loses nothing; FULL: nor does a machine without power
  execute "CREATE TABLE IF NOT EXISTS payments (id TEXT NOT NULL, cents INTEGER NOT NULL)"
  return connection
end

--- Enters a payment, in the transaction that is under way.
function books.enter(order)
  execute(("INSERT INTO payments VALUES ('%s', %d)"):format(connection:escape(order.id), order.cents))
end

return books
