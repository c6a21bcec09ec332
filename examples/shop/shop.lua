--- What the shop's scripts share: names, and where they keep their files.
-- SHOP (shop) begins every name in the broker, SHOP_DATA (.) is the folder.
local name = os.getenv "SHOP" or "shop"
local folder = os.getenv "SHOP_DATA" or "."

return {
  name = name,                     -- also the exchange's, and the ladder's that all three scripts retry on
  orders = name .. ".orders",
  payments = name .. ".payments",
  mail = name .. ".mail",
  path = function(file) return folder .. "/" .. file end,
}
